"""Put the source picture's attention into the UNet calls of an edit (Prompt-to-Prompt, Hertz et al., ICLR 2023).

Both jobs work on the final transformer options of one UNet call: nothing stays on the model, and replace patches of
other packs at the same place still compute the attention's output.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from ..editing.token_alignment import TokenMap
from .attention import AttentionSite, LastSiteReached, attention_maps, by_head, joined, with_attention

Site = tuple[str, AttentionSite]
"""("attn1" for self-attention or "attn2" for cross-attention, where)."""


def install(transformer_options: dict, sites: list[Site], attend: Callable) -> dict:
    """A copy of `transformer_options` in which `attend(site, attention, q, k, v, options)` draws these sites.

    See `maps.with_attention`.
    """
    for kind in {kind for kind, _ in sites}:
        of_kind = [site for other, site in sites if other == kind]
        transformer_options = with_attention(transformer_options, kind, of_kind, partial(_at_site, attend, kind))
    return transformer_options


def _at_site(attend: Callable, kind: str, site: AttentionSite, *args) -> torch.Tensor:
    return attend((kind, site), *args)


class SourceAttention:
    """Job: keep the queries and keys of one UNet call on the source picture.

    `sites`: where, none left out. `tokens`: of its text.
    """

    stops = True

    def __init__(self, sites: list[Site], tokens: int):
        self.sites = sites
        self.tokens = tokens
        self.kept: dict[Site, tuple[torch.Tensor, torch.Tensor]] = {}

    def tapped(self, call, transformer_options: dict) -> contextlib.AbstractContextManager[dict]:
        return contextlib.nullcontext(install(transformer_options, self.sites, self._keep))

    def _keep(self, site, attention, q, k, v, options):
        self.kept[site] = q, k
        if len(self.kept) == len(self.sites):
            raise LastSiteReached
        return attention(q, k, v, options)

    def maps(self, site: Site, heads: int) -> torch.Tensor:
        """The maps of the text that are drawn there, fp32 [B, heads, pixels, tokens]. Other packs may add keys of their own."""
        q, k = self.kept[site]
        return attention_maps(q, k[:, : self.tokens], heads)


@dataclass
class AttentionEdit:
    """Job: what the UNet calls of the edit take from the source.

    `cross`: all cross-attention sites of the UNet. `entries`: the conditioning entries (uuids) of the edited prompt; the
    rows of others stay as they are. `tokens`: of its text. `token_map`: carries the source's cross-attention maps over,
    or None to keep the edit's own. `factors`: [T] for the columns of the maps, or None. Its self-attention maps are the
    source's where `source` has them. `watch`: is given (site, maps of the source, maps of the edit) at sites in `watched`.
    """

    source: SourceAttention
    cross: list[Site]
    entries: set
    tokens: int
    token_map: TokenMap | None
    factors: torch.Tensor | None
    watched: list[Site] = field(default_factory=list)
    watch: Callable | None = None
    stops: ClassVar[bool] = False

    def tapped(self, call, transformer_options: dict) -> contextlib.AbstractContextManager[dict]:
        edited = self.cross if self.token_map is not None or self.factors is not None else self.watched
        sites = list(edited) + [site for site in self.source.kept if site[0] == "attn1"]

        def attend(site: Site, attention: Callable, q, k, v, options) -> torch.Tensor:
            size = len(q) // len(call.uuids)
            rows = [slice(i * size, (i + 1) * size) for i, uuid in enumerate(call.uuids) if uuid in self.entries]
            if site[0] == "attn1":
                return attention(*self._from_source(site, q, k, rows), v, options)
            out = attention(q, k, v, options).clone()
            for part in rows:
                change = self._change(site, q[part], k[part], v[part], options["n_heads"])
                if change is not None:
                    out[part] += change.to(out.dtype)
            return out

        return contextlib.nullcontext(install(transformer_options, sites, attend))

    def _from_source(self, site: Site, q, k, rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The source's q and k, which give its self-attention maps to the edit's values (as in the authors' code)."""
        source_q, source_k = self.source.kept[site]
        q, k = q.clone(), k.clone()
        for part in rows:
            if q[part].shape != source_q.shape or k[part].shape != source_k.shape:
                raise ValueError(
                    "model: another patch (HyperTile?) changes the shape of its self-attention from call to call. "
                    "Remove it (with HyperTile, swap_size 1 will do), or set self_until to 0."
                )
            q[part], k[part] = source_q, source_k
        return q, k

    def _change(self, site: Site, q, k, v, heads: int) -> torch.Tensor | None:
        """What the edited maps add to the attention's output: [B, pixels, heads*d].

        Added to the output rather than put in its place, so that what other patches add there stays.
        """
        # ComfyUI repeats texts to batch them with longer ones; the repeats share one map's attention.
        k, v = k[:, : self.tokens], v[:, : self.tokens]
        own = attention_maps(q, k, heads)
        edited = own
        if self.token_map is not None:
            edited = self.token_map.edit(self.source.maps(site, heads), own)
        if self.factors is not None:
            edited = edited * self.factors.to(edited)
        if site in self.watched:
            self.watch(site, self.source.maps(site, heads), edited)
        return None if edited is own else joined((edited - own) @ by_head(v, heads))
