"""The entries of a processed conditioning: several texts that draw one estimate between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from comfy.samplers import get_area_and_mult

from ..batching import TEXT_LENGTHS


@dataclass(frozen=True)
class Entry:
    """`area`: as the host has it, sizes, then offsets, or None for the whole picture. `tokens`: of its text, or None.

    `share`: [B, 1, h, w] over its area, how much of the estimate there is drawn from it, or None for all of it.
    `shared_tokens`: where it and the text that it is compared with are not of one length, how many tokens both have, for
    all pictures or for each. `compared`: False for a text that is only evaluated in the same calls.
    """

    uuid: object
    area: list | None = None
    tokens: int | None = None
    share: torch.Tensor | None = None
    shared_tokens: tuple[int, ...] | None = None
    compared: bool = True


def entries_of(conditioning: list[dict], x: torch.Tensor, timestep: torch.Tensor) -> list[Entry]:
    """The entries of a guider's conditioning at the latents `x` [B, C, H, W] and their noise level `timestep` [B]."""
    shares = _shares(conditioning, x, timestep) if len(conditioning) > 1 else {}
    return [
        Entry(entry["uuid"], entry.get("area"), _tokens(entry), shares.get(i)) for i, entry in enumerate(conditioning)
    ]


def compared_with(entries: list[Entry], conditioning: list[dict], reference: list[dict]) -> list[Entry]:
    """The entries of a processed conditioning with their `shared_tokens`. `reference`: another, entry i for entry i."""
    shared = [_shared_tokens(own, other) for own, other in zip(conditioning, reference)]
    return [replace(entry, shared_tokens=tokens) for entry, tokens in zip(entries, shared)] + entries[len(shared) :]


def _shared_tokens(*pair: dict) -> tuple[int, ...] | None:
    tokens = [_tokens(entry) for entry in pair]
    if None in tokens:
        return None
    own, others = (entry.get(TEXT_LENGTHS, (length,)) for entry, length in zip(pair, tokens))
    if {*tokens, *own, *others} == {tokens[0]}:
        return None
    return tuple(min(own[i % len(own)], others[i % len(others)]) for i in range(max(len(own), len(others))))


def areas_of(conditioning: Sequence[dict]) -> list[tuple | None]:
    """The area of each entry."""
    return [None if entry.get("area") is None else tuple(entry["area"]) for entry in conditioning]


def _tokens(entry: dict) -> int | None:
    text = entry["model_conds"].get("c_crossattn")
    return None if text is None else text.cond.shape[1]


def _shares(conditioning: list[dict], x: torch.Tensor, timestep: torch.Tensor) -> dict[int, torch.Tensor]:
    """By the weights that the host mixes their estimates with, for those that are active at this noise level."""
    weights = {}
    total = torch.zeros_like(x[:, :1])
    # The host gives a default entry what the others leave.
    for i, entry in sorted(enumerate(conditioning), key=lambda numbered: "default" in numbered[1]):
        drawn = get_area_and_mult(entry, x, timestep)
        if drawn is None:
            continue
        weights[i] = (1 - total).clamp(min=0) if "default" in entry else drawn.mult[:, :1]
        narrowed(total, entry.get("area")).add_(weights[i])
    return {i: weight / narrowed(total, conditioning[i].get("area")).clamp(min=1e-6) for i, weight in weights.items()}


def narrowed(tensor: torch.Tensor, area: list | None) -> torch.Tensor:
    """The view of [B, C, H, W] that a conditioning's area covers; all of it when there is none."""
    if area is None:
        return tensor
    dims = len(area) // 2
    for i in range(dims):
        tensor = tensor.narrow(i + 2, area[dims + i], min(area[i], tensor.shape[i + 2] - area[dims + i]))
    return tensor


def own_tokens(keys: int, entries: list[Entry]) -> list[int]:
    """How many of `keys` tokens are each entry's own, in a batch where the host repeats shorter texts to one length."""
    lengths = [entry.tokens for entry in entries]
    if None in lengths or math.lcm(*lengths) != keys:
        return [keys] * len(entries)
    return lengths
