"""Reach the cross-attention maps of one UNet call, beside whatever other packs have patched into it."""

from collections.abc import Callable, Iterable

import torch

from .replacement import with_attention
from .sites import AttentionSite

Visit = Callable[[AttentionSite, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


class LastSiteReached(Exception):  # noqa: N818 - a signal, not an error
    """Raised out of the UNet once every map is read, so that the rest of the call is not computed."""


class AttentionTap:
    """Calls `visit(site, q, k, heads)` ahead of each site's attention, which goes on with the q and k it returns.

    It is installed on the final transformer options of a single UNet call, not on the model: nothing stays behind, and
    a replace patch of another pack at the same site still computes the attention's output.
    """

    def __init__(self, sites: Iterable[AttentionSite], visit: Visit):
        self.sites = sites
        self.visit = visit

    def install(self, transformer_options: dict) -> dict:
        """A copy of `transformer_options` with the tap in it."""
        return with_attention(transformer_options, "attn2", self.sites, self._attend)

    def _attend(self, site, q, k, v, heads, attention):
        return attention(*self.visit(site, q, k, heads), v)


def attention_maps(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) in fp32: [B, heads, pixels, tokens].

    `q`: [B, pixels, heads*d], `k`: [B, tokens, heads*d].
    """
    q, k = (_by_head(t, heads) for t in (q, k))
    return (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5).softmax(-1)


def maps_of_first(maps: torch.Tensor, tokens: int) -> torch.Tensor:
    """The maps [..., tokens] that `maps` [..., more tokens] would be if the text ended after so many.

    A softmax over some of the logits is that part of the whole one, scaled to sum to 1.
    """
    first = maps[..., :tokens]
    return first / first.sum(-1, keepdim=True).clamp_min(torch.finfo(first.dtype).tiny)


def _by_head(t: torch.Tensor, heads: int) -> torch.Tensor:
    return t.float().unflatten(-1, (heads, -1)).transpose(1, 2)
