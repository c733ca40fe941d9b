"""A source's queries and keys in the attention of diffusion transformers, and words that are read more or less.

Prompt-to-Prompt where picture and text attend together (Hertz et al., ICLR 2023; Shin et al., ICCV 2025): not the maps are
replaced but what the picture's rows ask and answer with, so that its own words are read where the source's stood.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .attention import LastSiteReached
from .joint import Attention, JointSite, with_joint_attention
from .joint_maps import reweighted, text_maps

QueryKey = tuple[torch.Tensor, torch.Tensor]
Watch = Callable[[torch.Tensor], None]


class SourceRows:
    """Job: keep q and k [B, heads, rows, d] of the picture at `sites`, and show `watch` the maps of the text at `watched`.

    `last`: the site after which the call may end. `words`: rows of the source's text.
    """

    stops = True

    def __init__(self, sites: Collection[JointSite], watched: Collection[JointSite], last: JointSite, words: int):
        self.sites, self.watched, self.last, self.words = sites, watched, last, words
        self.kept: dict[JointSite, QueryKey] = {}
        self.maps: dict[JointSite, torch.Tensor] = {}

    def tapped(self, call, transformer_options: dict) -> contextlib.AbstractContextManager[dict]:
        return with_joint_attention(call, {*self.sites, *self.watched}, self._attend, transformer_options)

    def _attend(self, site: JointSite, attention: Attention, q, k, v) -> torch.Tensor:
        here = attention.picture
        if site in self.sites:
            self.kept[site] = q[:, :, here].clone(), k[:, :, here].clone()
        if site in self.watched:
            self.maps[site] = text_maps(attention, q, k, attention.text(self.words))
        if site == self.last:
            raise LastSiteReached
        return attention(q, k, v)


@dataclass
class JointEdit:
    """Job: what the calls of an edit take from the source, in the entries (uuids) of the edited prompt.

    `kept`: by site, the source's q and k of the picture. `keys`: whether its keys are taken too, beside the queries.
    `factors`: [words] of the text's rows, or None; at `reading`, where the text is read. `watch(maps)`: of the text at
    `watched`. `words`: rows of the edited text. `taken`: at which sites a picture takes from the source, one choice for all
    pictures or one for each; all of `kept` where there is none.
    """

    entries: set
    kept: dict[JointSite, QueryKey]
    keys: bool
    factors: torch.Tensor | None
    reading: Collection[JointSite]
    watched: Collection[JointSite]
    watch: Watch
    words: int
    taken: Sequence[Collection[JointSite]] = ()
    stops: ClassVar[bool] = False

    def tapped(self, call, transformer_options: dict) -> contextlib.AbstractContextManager[dict]:
        sites = {*self.kept, *self.watched, *(self.reading if self.factors is not None else ())}

        def attend(site: JointSite, attention: Attention, q, k, v) -> torch.Tensor:
            size = len(q) // len(call.uuids)
            rows = [slice(i * size, (i + 1) * size) for i, uuid in enumerate(call.uuids) if uuid in self.entries]
            q, k = self._from_source(site, attention, q, k, rows)
            out = attention(q, k, v)
            out = out if self.factors is None else out.clone()
            for part in rows:
                self._read(site, attention.of_rows(part), (q[part], k[part], v[part]), out[part])
            return out

        return with_joint_attention(call, sites, attend, transformer_options)

    def _from_source(self, site: JointSite, attention: Attention, q, k, rows) -> QueryKey:
        if site not in self.kept:
            return q, k
        source_q, source_k = self.kept[site]
        q = q.clone()
        k = k.clone() if self.keys else k
        own = [i for i in range(len(source_q)) if not self.taken or site in self.taken[i % len(self.taken)]]
        for part in rows:
            here = [part.start + i for i in own]
            q[here, :, attention.picture] = source_q[own]
            if self.keys:
                k[here, :, attention.picture] = source_k[own]
        return q, k

    def _read(self, site: JointSite, attention: Attention, qkv: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """Show the maps of some rows, and change their output in place."""
        columns = attention.text(self.words)
        if site in self.watched:
            self.watch(text_maps(attention, *qkv[:2], columns))
        if self.factors is not None and site in self.reading:
            out[:, attention.picture] = reweighted(attention, *qkv, out[:, attention.picture], (columns, self.factors))
