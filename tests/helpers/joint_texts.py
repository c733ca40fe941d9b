"""The text encoder of a flow family as wide as its small network reads: a small encoder whose rows are widened."""

import copy
import functools

import torch
from flow_encoders import ENCODERS, small_encoder
from flow_families import FAMILIES

ENCODER = {name: name for name in ENCODERS} | {
    "SD 3.5 Medium": "SD 3",
    "Flux dev": "Flux",
    "Flux schnell": "Flux",
    "Kandinsky 5": "Flux",  # has a pooled text too
}


@functools.cache  # to draw it takes longer than to encode a text
def _widening(before: int, after: int) -> torch.Tensor:
    return torch.randn(before, after, generator=torch.Generator().manual_seed(9)) * before**-0.5


def wide(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Rows [.., n] at another width, each by itself."""
    if rows.shape[-1] == width:  # SD 3's
        return rows
    return rows @ _widening(rows.shape[-1], width)


def family_clip(name: str):
    """A CLIP for `small_family(name)`."""
    family, clip = FAMILIES[name], copy.copy(small_encoder(ENCODER[name]))
    encode, scheduled = clip.encode_from_tokens, clip.encode_from_tokens_scheduled

    def plain(tokens, *args, **options):
        cond = encode(tokens, *args, **options)
        return cond if isinstance(cond, dict) else wide(cond, family.text)  # as `scheduled` asks for it

    def entries(tokens, *args, **options):
        ((cond, own),) = scheduled(tokens, *args, **options)
        pooled = wide(own["pooled_output"], family.pooled) if family.pooled else None
        extra = {} if name == "Anima" else family.extra(1, torch.Generator().manual_seed(1))
        return [[wide(cond, family.text), {**own, "pooled_output": pooled, **extra}]]

    clip.encode_from_tokens, clip.encode_from_tokens_scheduled = plain, entries
    return clip
