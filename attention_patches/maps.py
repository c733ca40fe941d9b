"""Read the cross-attention maps of one UNet call, beside whatever other packs have patched into it."""

from collections.abc import Callable

import torch
from comfy.ldm.modules.attention import attention_pytorch

from .sites import AttentionSite


class LastSiteReached(Exception):  # noqa: N818 - a signal, not an error
    """Raised out of the UNet once every map is read, so that the rest of the call is not computed."""


class MapTap:
    """Hands the maps of each site to `on_maps(site, maps)`, maps being fp32 [batch, heads, H*W, tokens].

    It is installed on the final transformer options of a single UNet call, not on the model: nothing stays behind, and
    a replace patch of another pack at the same site still computes the attention's output.
    """

    def __init__(self, sites: list[AttentionSite], on_maps: Callable[[AttentionSite, torch.Tensor], None]):
        self.sites = sites
        self.on_maps = on_maps

    def install(self, transformer_options: dict) -> dict:
        """A copy of `transformer_options` with the tap in it."""
        options = transformer_options.copy()
        options["patches_replace"] = options.get("patches_replace", {}).copy()
        theirs = options["patches_replace"].get("attn2", {})
        ours = {site: self._tap(site, theirs.get(site, theirs.get(site[:2]))) for site in self.sites}
        options["patches_replace"]["attn2"] = theirs | ours
        return options

    def _tap(self, site: AttentionSite, previous):
        def attend(q, k, v, extra_options):
            heads = extra_options["n_heads"]
            self.on_maps(site, attention_maps(q, k, heads))
            if site == self.sites[-1]:
                raise LastSiteReached
            if previous is not None:
                return previous(q, k, v, extra_options)
            return attention_pytorch(q, k, v, heads)

        return attend


def attention_maps(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) in fp32: [B, heads, pixels, tokens].

    `q`: [B, pixels, heads*d], `k`: [B, tokens, heads*d].
    """
    q, k = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
