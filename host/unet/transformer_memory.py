"""The memory of a guided step of a diffusion transformer, counted from its shapes."""

import statistics

import torch

from ...attention_patches.joint import (
    CHOSEN,
    JointSite,
    blocks_before,
    known_blocks,
    patches,
    reading_calls,
    reading_sites,
)

TENSORS = 20
"""A block keeps at most so many tensors of its rows for its backward pass: twelve in Flux and SD 3, more with gated layers."""
GRADIENT_ITEM = 4  # maps, and the gradients of their distance, are fp32 in every precision
HEADS = ("num_heads", "n_heads", "n_local_heads", "heads", "num_attention_heads")


def graph_parts(
    dit: torch.nn.Module, latent_shape: tuple[int, ...], mode: str, item: int, tokens: int
) -> dict[str, int]:
    """Bytes that one guided pass needs at its peak, by what they are for.

    `latent_shape`: [B, .., H, W] of the latent. `mode`: see `memory.checkpointed`. `item`: bytes of a number in the
    computation. `tokens`: of the text. "activations": what blocks keep for the backward pass, those ahead of the last only
    their inputs where they are computed again. "block": what is at work in the backward pass of one. "gradients": of the
    distance, with respect to the queries. "maps": of one attention, and what its distance is computed with.
    """
    sites = matched_at_most(dit)
    pixels = latent_shape[0] * patches(dit, torch.empty(latent_shape, device="meta"))
    width, heads = _width(dit, sites[-1]), _heads(dit, sites[-1])
    tensor = (pixels + latent_shape[0] * tokens) * width * item
    kept = len(blocks_before(dit, sites[-1])) * (TENSORS if mode == "none" else 1) + TENSORS
    return {
        "activations": kept * tensor,
        "block": TENSORS * tensor,
        "gradients": len(sites) * pixels * width * GRADIENT_ITEM,
        "maps": 3 * heads * pixels * tokens * GRADIENT_ITEM,
    }


def pass_memory(
    dit: torch.nn.Module,
    latent_shape: tuple[int, ...],
    parts: tuple[str, int, int],
    constant_weights: bool,
    records: bool,
) -> int:
    """Bytes that one guided pass needs, `parts` being the last arguments of `graph_parts`. For the rest see `memory`."""
    mode, item, tokens = parts
    graph = sum(graph_parts(dit, latent_shape, *parts).values())
    copies = 0 if constant_weights else copied_weights(dit, mode, item)
    return graph + copies + (reference_memory(dit, latent_shape, tokens) if records else 0)


def reference_memory(dit: torch.nn.Module, latent_shape: tuple[int, ...], tokens: int) -> int:
    """Bytes of the source's maps over so many tokens, in all attentions that are matched."""
    sites = matched_at_most(dit)
    pixels = latent_shape[0] * patches(dit, torch.empty(latent_shape, device="meta"))
    return len(sites) * _heads(dit, sites[-1]) * pixels * tokens * GRADIENT_ITEM


def matched_at_most(dit: torch.nn.Module) -> list[JointSite]:
    """The attentions that are matched, or where they are chosen for the edit, the last ones that may be."""
    return reading_sites(dit) if known_blocks(dit) is not None else reading_calls(dit)[-CHOSEN:]


def copied_weights(dit: torch.nn.Module, mode: str, item: int) -> int:
    """Bytes of the copies that a pass holds of weights that are cast or moved for each layer."""
    last = matched_at_most(dit)[-1]
    blocks = [*blocks_before(dit, last), getattr(dit, last.blocks)[last.number]]
    sizes = [sum(weight.numel() for weight in block.parameters()) * item for block in blocks]
    return sum(sizes) if mode == "none" else sizes[-1] + max(sizes)


def _width(dit: torch.nn.Module, site: JointSite) -> int:
    """Of a row in a block: what most of its layers take."""
    block = getattr(dit, site.blocks)[site.number]
    return statistics.mode(module.in_features for module in block.modules() if isinstance(module, torch.nn.Linear))


def _heads(dit: torch.nn.Module, site: JointSite) -> int:
    block = getattr(dit, site.blocks)[site.number]
    named = (getattr(module, name, None) for module in block.modules() for name in HEADS)
    return next((heads for heads in named if isinstance(heads, int)), 1)
