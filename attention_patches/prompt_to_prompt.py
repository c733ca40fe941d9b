"""Put the source picture's attention into the UNet calls of an edit (Prompt-to-Prompt, Hertz et al., ICLR 2023).

Both halves work on the final transformer options of one UNet call, as `AttentionTap` does: nothing stays on the model,
and replace patches of other packs at the same place still compute the attention's output.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from ..editing.token_alignment import TokenMap
from .maps import LastSiteReached, attention_maps
from .replacement import with_attention
from .sites import AttentionSite

Place = tuple[str, AttentionSite]
"""("attn1" for self-attention or "attn2" for cross-attention, site)."""


def install(transformer_options: dict, places: list[Place], attend: Callable) -> dict:
    """A copy of `transformer_options` in which `attend(place, q, k, v, heads, attention)` draws these places.

    `attention(q, k, v)` is what would have drawn it otherwise.
    """
    for kind in {kind for kind, _ in places}:
        sites = [site for other, site in places if other == kind]
        transformer_options = with_attention(transformer_options, kind, sites, partial(_at_place, attend, kind))
    return transformer_options


def _at_place(attend: Callable, kind: str, site: AttentionSite, *args) -> torch.Tensor:
    return attend((kind, site), *args)


class SourceAttention:
    """The queries and keys of one UNet call on the source picture. `places`: where to keep them."""

    def __init__(self, places: list[Place]):
        self.places = places
        self.kept: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}

    def install(self, transformer_options: dict) -> dict:
        """Transformer options whose call fills `kept`, and ends in `LastSiteReached` when it holds everything."""
        return install(transformer_options, self.places, self._keep)

    def _keep(self, place, q, k, v, heads, attention):
        self.kept[place] = q, k
        if len(self.kept) == len(self.places):
            raise LastSiteReached
        return attention(q, k, v)

    def maps(self, place: Place, heads: int) -> torch.Tensor:
        """The maps drawn there, fp32 [B, heads, pixels, tokens]."""
        return attention_maps(*self.kept[place], heads)


@dataclass
class AttentionEdit:
    """What one UNet call of the edit takes from the source.

    `entries`: the conditioning entries (uuids) of the edited prompt; the rows of others stay as they are. `token_map`:
    carries the source's cross-attention maps over, or None to keep the edit's own. `factors`: [T] for the columns of the
    maps, or None. `self_attention`: whether its self-attention maps are the source's, where `source` has them. `watch`:
    is given (place, maps of the source, maps of the edit) at places in `watched`.
    """

    source: SourceAttention
    entries: set
    tokens: int
    token_map: TokenMap | None
    factors: torch.Tensor | None
    watched: list[Place] = field(default_factory=list)
    watch: Callable | None = None

    def install(self, transformer_options: dict, cross: list[Place]) -> dict:
        """Transformer options whose call is edited. `cross`: all cross-attention places of the UNet."""
        uuids = transformer_options["uuids"]
        edited = cross if self.token_map is not None or self.factors is not None else self.watched
        places = list(edited) + [place for place in self.source.kept if place[0] == "attn1"]

        def attend(place, q, k, v, heads, attention):
            size = len(q) // len(uuids)
            rows = [slice(i * size, (i + 1) * size) for i, uuid in enumerate(uuids) if uuid in self.entries]
            if place[0] == "attn1":
                return self._attend_to_itself(place, q, k, v, rows, attention)
            out = attention(q, k, v).clone()
            for part in rows:
                change = self._change(place, q[part], k[part], v[part], heads)
                if change is not None:
                    out[part] += change.to(out.dtype)
            return out

        return install(transformer_options, places, attend)

    def _attend_to_itself(self, place, q, k, v, rows, attention):
        """The source's self-attention maps, given by its q and k, with the edit's values (as in the authors' code)."""
        source_q, source_k = self.source.kept[place]
        q, k = q.clone(), k.clone()
        for part in rows:
            if q[part].shape != source_q.shape or k[part].shape != source_k.shape:
                raise ValueError(
                    "model: another patch (HyperTile?) changes the shape of its self-attention from call to call. "
                    "Remove it (with HyperTile, swap_size 1 will do), or set self_until to 0."
                )
            q[part], k[part] = source_q, source_k
        return attention(q, k, v)

    def _change(self, place, q, k, v, heads) -> torch.Tensor | None:
        """What the edited maps add to the attention's output: [B, pixels, heads*d].

        Added to the output rather than put in its place, so that what other patches add there stays.
        """
        # ComfyUI repeats texts to batch them with longer ones; the repeats share one map's attention.
        k, v = k[:, : self.tokens], v[:, : self.tokens]
        own = attention_maps(q, k, heads)
        edited = own
        if self.token_map is not None:
            edited = self.token_map.edit(self.source.maps(place, heads), own)
        if self.factors is not None:
            edited = edited * self.factors.to(edited)
        if place in self.watched:
            self.watch(place, self.source.maps(place, heads), edited)
        if edited is own:
            return None
        values = v.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        return ((edited - own) @ values).transpose(1, 2).flatten(2)
