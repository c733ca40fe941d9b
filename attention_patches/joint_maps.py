"""How much each part of the picture reads of the text in a diffusion transformer, exact in small parts."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .attention import LastSiteReached, joined
from .joint import Attention, JointSite, with_joint_attention

PART = 256
"""Rows of the picture whose softmax is held at once."""

Weights = tuple[slice, torch.Tensor]


def text_maps(attention: Attention, q: torch.Tensor, k: torch.Tensor, columns: slice) -> torch.Tensor:
    """The columns of softmax(q k^T / sqrt(d)) in the picture's rows, the mean of the heads: fp32 [B, rows, columns].

    q, k: [B, heads, .., d]. The softmax is over all keys, so that rows sum to the attention that these columns draw.
    """
    return torch.cat([part[..., columns].mean(1) for part in _softmax(attention, q, k)], 1)


def reweighted(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, weights: Weights
) -> torch.Tensor:
    """The output [B, picture's rows, heads*d] of attention whose logits had log(factor) added, from that without, `out`.

    `weights`: (the columns of the text, their factors [columns], 0 or more). A softmax whose terms are weighted is the old one
    weighted and divided by its new sum, and only the columns with another factor than 1 are needed for it.
    """
    columns, factors = weights
    changed = [i for i, factor in enumerate(factors.tolist()) if factor != 1]
    where = [columns.start + i for i in changed]
    more = factors[changed].to(q.device) - 1
    maps = torch.cat([part[..., where] for part in _softmax(attention, q, k)], 2) * more  # [B, heads, rows, changed]
    values = v[:, :, where].float()
    if values.shape[1] != maps.shape[1]:
        values = values.repeat_interleave(maps.shape[1] // values.shape[1], 1)
    whole = (1 + maps.sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    old = out.float().unflatten(-1, (maps.shape[1], -1)).transpose(1, 2)
    return joined((old + maps @ values) / whole).to(out)


def _softmax(attention: Attention, q: torch.Tensor, k: torch.Tensor) -> Iterator[torch.Tensor]:
    """softmax(q k^T / sqrt(d)) in the picture's rows, some at a time: fp32 [B, heads, some rows, keys]."""
    if k.shape[1] != q.shape[1]:  # several heads of queries share one of keys
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    bias = _bias(attention.mask, attention.picture)
    k = k.float()
    for number, part in enumerate(q[:, :, attention.picture].split(PART, 2)):
        logits = part.float() @ k.mT * attention.scale(q)
        if bias is not None:
            rows = slice(number * PART, number * PART + part.shape[2])
            logits = logits + (bias[:, :, rows] if bias.shape[2] > 1 else bias)
        yield logits.softmax(-1)


def _bias(mask: torch.Tensor | None, picture: slice) -> torch.Tensor | None:
    """What a mask [B, rows or 1, keys], with heads or without, adds to the picture's logits, [B, heads or 1, rows or 1, keys]."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    mask = mask.float()
    if mask.ndim == 2:
        mask = mask.unsqueeze(0)
    if mask.ndim == 3:
        mask = mask.unsqueeze(1)
    return mask[:, :, picture] if mask.shape[2] > 1 else mask


@dataclass
class ReadTextMaps:
    """Job: `keep(maps)` of each of `sites`, of the text's `rows`: [B, picture's rows, text's rows]. The rest is skipped."""

    sites: Sequence[JointSite]
    rows: int
    keep: Callable[[torch.Tensor], None]
    stops: ClassVar[bool] = True

    def tapped(self, call, transformer_options: dict) -> contextlib.AbstractContextManager[dict]:
        return with_joint_attention(call, set(self.sites), self._attend, transformer_options)

    def _attend(self, site: JointSite, attention: Attention, q, k, v) -> torch.Tensor:
        self.keep(text_maps(attention, q, k, attention.text(self.rows)))
        if site == self.sites[-1]:
            raise LastSiteReached
        return attention(q, k, v)
