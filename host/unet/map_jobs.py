"""Jobs that record or match the cross-attention maps of UNet calls, see `jobs`."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import comfy.model_management
import torch

from ...attention_patches.attention import (
    AttentionSite,
    GradientScale,
    LastSiteReached,
    MatchedAttention,
    attention_maps,
    is_unet,
    maps_of_first,
    with_attention,
)
from ...attention_patches.joint import JointSite
from ...editing.guidance import Maps
from .. import messages, running
from ..out_of_memory import is_out_of_memory, out_of_memory
from ..text.conditionings import Entry, narrowed, own_tokens
from .gradients import (
    clone_inference,
    clone_skips,
    differentiable_attention,
    input_gradients,
    protect_from_patches,
)
from .jobs import LEFT_OUT, UNetCall
from .memory import MODES, checkpointed
from .text_attention import COLUMNS, with_text_attention

Site = AttentionSite | JointSite
Columns = int | tuple[int, ...]
"""Keys of a text: so many of a UNet's, the first ones, or some of all keys of a transformer."""
Group = tuple[list[int], Columns]
"""Rows of a call that are compared, and the keys over which."""

SCALES = 4  # that are tried of a gradient in fp16, see `GradientScale`
OVERFLOW = (
    "model: the gradient of its attention maps overflows in fp16. Load the model in bf16 or fp32 for guided sampling."
)

NO_MEMORY = (
    "model: memory ran out in a guided step, even with one picture computed in the smallest parts. Make the picture smaller, set "
    "map_memory of Invert Picture to 0 and invert again, or free memory that other programs hold."
)


class Checkpointing:
    """What an edit's guided passes do for memory; it is tightened when memory runs out, and stays so.

    `mode`: see `memory.checkpointed`. `rows`: how many pictures are worked on at once, each entry of the
    conditioning counting as one.
    """

    def __init__(self, mode: str, rows: int):
        self.mode = mode
        self.rows = rows

    def tighten(self, rows: int) -> bool:
        """Go to what needs the least memory for `rows`, then to fewer of them. False if there is nothing left."""
        if self.mode == MODES[-1] and rows == 1:
            return False
        if self.mode == MODES[-1]:
            self.rows = math.ceil(rows / 2)
        self.mode = MODES[-1]
        running.warn(messages.OUT_OF_MEMORY)
        return True


class RecordMaps:
    """Job: hand the maps to `keep((number of the entry, site), maps)`, fp32 [B, heads, H*W, tokens].

    Of the pictures that are compared at a site alone. Where they are compared over unequal numbers of tokens, zeros follow.
    `stops`: skip the rest of the UNet. Without it, the output is that of a call without the job. `made`: whether there was
    a call.
    """

    def __init__(self, sites: list[Site], entries: list[Entry], keep: Callable, stops: bool):
        self.sites = sites
        self.entries = entries
        self.keep = keep
        self.stops = stops
        self.made = False

    @contextlib.contextmanager
    def tapped(self, call: UNetCall, transformer_options: dict) -> Iterator[dict]:
        entries, numbers = _in_call(call, self.entries)
        seen = set()
        self.made = True

        def attend(site, attention, q, k, v, options):
            seen.add(site)
            of_entries = zip(entries, _columns(k, entries, options), q.chunk(len(numbers)), k.chunk(len(numbers)))
            for number, (entry, columns, *qk) in zip(numbers, of_entries):
                groups = [] if number is None else _groups(entry, columns, site, _pictures(call))
                if groups:
                    self.keep((number, site), _maps(groups, *qk, options["n_heads"]))
            if self.stops and site == self.sites[-1]:
                raise LastSiteReached
            return attention(q, k, v, options)

        with _tapped(call, self.sites, entries, attend, transformer_options) as options:
            yield options
        if len(seen) < len(self.sites):
            raise ValueError(LEFT_OUT)


class MatchMaps:
    """Job: the attention distance to `reference`, `distance` [B], and its `gradient`, of the shape of `x`, afterwards.

    Where several entries draw, each counts as much as its share of the estimate; one without a reference is not guided.
    Texts of unequal length are compared over the tokens that both have, as if the longer one ended there: what the words
    after them draw is left free. Repeating both to one length, as the host does in a batch, would compare those words
    with others that happen to stand in their place.
    `stops`: skip the rest of the UNet. Without it, the output is that of a call without the job; no graph is recorded
    past the last site.
    """

    def __init__(
        self,
        sites: list[Site],
        entries: list[Entry],
        reference: Maps,
        x: torch.Tensor,
        checkpointing: Checkpointing,
        stops: bool,
    ):
        self.sites = sites
        self.entries = entries
        self.reference = reference
        self.checkpointing = checkpointing
        self.stops = stops
        self.overflows = 0
        self.made = False
        self.gradient = torch.zeros_like(x)
        self.distance = x.new_zeros(len(x))

    def tapped(self, call: UNetCall, transformer_options: dict) -> contextlib.AbstractContextManager[dict]:
        return contextlib.nullcontext(transformer_options)

    @property
    def rows(self) -> int:
        """How many latents are worked on at once."""
        return self.checkpointing.rows

    def check(self, call: UNetCall) -> None:
        """Raise ValueError for a call that is a part which another pack has made."""
        entries, numbers = _in_call(call, self.entries)
        if any(
            (len(call.x), *call.x.shape[2:]) != (len(numbers) * len(target), *target.shape[2:])
            for target in (narrowed(self.gradient, entry.area) for entry, i in zip(entries, numbers) if i is not None)
        ):
            raise ValueError(
                "model: another node cuts the picture or the batch into parts of its own for the UNet, so that its "
                "attention cannot be matched. Take out that node, or set guidance_strength to 0."
            )

    def run(self, call: UNetCall) -> torch.Tensor | None:
        """The output of a part, whose gradient and distance are added up; None if it is to be made again.

        That is in fewer rows where memory ran out. Where the gradient overflowed, it is at a smaller scale: a graph that
        is kept for a second backward pass is never freed with checkpointing.
        """
        self.made = True
        matching = _Matching(self, call)
        if not matching.sites:
            return torch.zeros_like(call.x) if self.stops else call(call.x, call.transformer_options)
        unet, mode = call.model.diffusion_model, self.checkpointing.mode
        try:
            with (
                input_gradients(call.model),
                matching.installed(call.transformer_options) as options,
                checkpointed(unet, mode, matching.sites[-1]),
            ):
                x = call.x.clone().requires_grad_(True)
                output = call(x, options, clone_inference).detach()
                gradient, distances = matching.gradient(x)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            output = None
        if output is None:  # the error is gone here, and with it the tensors of its frames
            comfy.model_management.soft_empty_cache()
            if self.checkpointing.tighten(len(call.x)):
                return None
            raise out_of_memory(NO_MEMORY)
        if not matching.scale.holds(gradient):
            self.overflows += 1
            if self.overflows == SCALES:
                raise ValueError(OVERFLOW)
            return None
        for number, *of_entry in zip(matching.numbers, gradient.chunk(len(distances)), distances):
            if number is not None:
                self._add(self.entries[number], matching.pictures, *of_entry)
        return output

    def _add(self, entry: Entry, pictures: slice, gradient: torch.Tensor, distance: torch.Tensor) -> None:
        if entry.share is not None:
            share = entry.share[pictures]
            gradient = gradient * share
            distance = distance * share.flatten(1).sum(1) / self.gradient[0, 0].numel()
        narrowed(self.gradient, entry.area)[pictures].add_(gradient)
        self.distance[pictures] += distance


class _Matching:
    """What one differentiated call does at each site.

    `sites`: those where any of its pictures is compared. `distances`: of each entry in it, by site. `last_q`: what the backward
    pass starts from.
    """

    def __init__(self, job: MatchMaps, call: UNetCall):
        self.job = job
        self.call = call
        self.pictures = slice(call.first, call.first + call.pictures)
        self.entries, self.numbers = _in_call(call, job.entries)
        self.sites = [site for site in job.sites if any(self._is_compared(i, site) for i in range(len(self.numbers)))]
        self.scale = GradientScale(job.overflows)
        self.distances = [{} for _ in self.numbers]
        self.last_q = None

    def _is_compared(self, i: int, site: Site) -> bool:
        known = self.entries[i].compared and (self.numbers[i], site) in self.job.reference
        return known and any(self.entries[i].compared_at(site, picture) for picture in _pictures(self.call))

    def installed(self, options: dict) -> contextlib.AbstractContextManager[dict]:
        """While active, calls with these transformer options can be differentiated and come by here at each site."""
        options = protect_from_patches(differentiable_attention(options))
        if self.call.arguments["control"] is not None:
            options = clone_skips(options)
        return _tapped(self.call, self.sites, self.entries, self.attend, options)

    def attend(self, site: Site, attention: Callable, q, k, v, options: dict) -> torch.Tensor:
        """The attention's output at a site; a backward pass through it adds the gradient of the distance there."""
        if q.requires_grad:
            q.register_hook(_look)
        columns = _columns(k, self.entries, options)
        queries, keys = (list(tensor.chunk(len(self.numbers))) for tensor in (q, k))
        for i, own in enumerate(columns):
            groups = self._compared(i, site, queries[i], keys[i], own) if self._is_compared(i, site) else []
            if not groups:
                continue
            matched, zeros = [], q.new_zeros(len(queries[i]), dtype=torch.float32)
            for rows, part_q, part_k, own_keys, reference in groups:
                compared = _keys(part_k, own_keys)
                _check_maps(part_q, compared, reference, options["n_heads"])
                part = MatchedAttention.apply(part_q, compared, reference, options["n_heads"], self.scale)
                matched.append((rows, part[0], _with_columns(part_k, own_keys, part[1]), part[2]))
            rows, *parts = zip(*matched)
            queries[i], keys[i], self.distances[i][site] = (
                _placed(rows, *tensors) for tensors in zip(parts, (queries[i], keys[i], zeros))
            )
        q, k = _joined(queries), _joined(keys)
        if site == self.sites[-1]:
            self.last_q = q
            if self.job.stops:
                raise LastSiteReached
            torch.set_grad_enabled(False)  # until `input_gradients` ends
        return attention(q, k, v, options)

    def _compared(self, i: int, site: Site, q, k, columns: Sequence[Columns]) -> list[tuple]:
        """(rows, q, k, keys, reference) of an entry's pictures, in as few groups as are compared over the same keys."""
        entry, pictures = self.entries[i], _pictures(self.call)
        groups = _groups(entry, entry.shared_tokens or columns, site, pictures)
        before = len(_rows(_groups(entry, columns, site, range(pictures.start))))
        users = sorted(_rows(groups))
        reference = self.job.reference[self.numbers[i], site][before : before + len(users)]
        compared = []
        for rows, keys in groups:
            maps = _picked(reference, [users.index(row) for row in rows])
            if entry.shared_tokens is not None:
                maps = maps_of_first(maps, keys)
            elif isinstance(keys, tuple):
                maps = maps[..., : len(keys)]
            compared.append((rows, _picked(q, rows), _picked(k, rows), keys, maps))
        return compared

    def gradient(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the backward pass: (the gradient with respect to x, each entry's distance)."""
        if self.last_q is None:
            raise ValueError(LEFT_OUT)
        self.scale.settle()
        # The distance enters the backward pass at every site, so that it starts from nothing.
        (gradient,) = torch.autograd.grad(self.last_q, x, torch.zeros_like(self.last_q))
        distances = [sum(of_entry.values(), x.new_zeros(())) for of_entry in self.distances]
        return gradient / self.scale.value, distances


def _look(_: torch.Tensor) -> None:
    """Let the backward pass, in which no layer of the host looks, be cancelled."""
    running.throw_if_interrupted()


def _tapped(
    call: UNetCall, sites: list[Site], entries: list[Entry], attend: Callable, options: dict
) -> contextlib.AbstractContextManager[dict]:
    """While active, `attend` gives the output at `sites` of calls with these transformer options, see `with_attention`."""
    if is_unet(call.model.diffusion_model):
        return contextlib.nullcontext(with_attention(options, "attn2", sites, attend))
    return with_text_attention(call, sites, entries, attend, options)


def _columns(k: torch.Tensor, entries: list[Entry], options: dict) -> list[list[Columns]]:
    """The keys of each entry's text that are compared, of all pictures or of each.

    A UNet's are all its own, without repetitions by the host.
    """
    return options.get(COLUMNS) or [[tokens] for tokens in own_tokens(k.shape[1], entries)]


def _pictures(call: UNetCall) -> range:
    """The numbers of a call's pictures in the batch."""
    return range(call.first, call.first + call.pictures)


def _groups(entry: Entry, columns: Sequence[Columns], site: Site, pictures: range) -> list[Group]:
    """The rows of some pictures that are compared at a site, in as few groups as are compared over the same keys."""
    groups: dict[Columns, list[int]] = {}
    for row, picture in enumerate(pictures):
        own = columns[picture % len(columns)]
        if own != () and entry.compared_at(site, picture):
            groups.setdefault(own, []).append(row)
    return [(rows, own) for own, rows in groups.items()]


def _rows(groups: list[Group]) -> list[int]:
    return [row for rows, _ in groups for row in rows]


def _maps(groups: list[Group], q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """The maps of the rows that are compared, in their order."""
    parts = [attention_maps(_picked(q, rows), _keys(_picked(k, rows), keys), heads) for rows, keys in groups]
    longest = max(part.shape[-1] for part in parts)
    padded = [torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in parts]
    return _in_order(_joined(padded), _rows(groups))


def _picked(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, torch.tensor(rows, device=tensor.device))


def _placed(rows_of: Sequence[list[int]], parts: Sequence[torch.Tensor], whole: torch.Tensor) -> torch.Tensor:
    """`whole` with other rows in their places."""
    rows = [row for rows in rows_of for row in rows]
    rest = [row for row in range(len(whole)) if row not in rows]
    return _in_order(_joined([*parts, _picked(whole, rest)] if rest else parts), rows + rest)


def _in_order(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """A tensor whose rows are of such numbers, by number."""
    places = sorted(range(len(rows)), key=rows.__getitem__)
    return tensor if places == list(range(len(rows))) else tensor[places]


def _keys(k: torch.Tensor, columns: Columns) -> torch.Tensor:
    return k[:, :columns] if isinstance(columns, int) else k[:, list(columns)]


def _with_columns(k: torch.Tensor, columns: Columns, theirs: torch.Tensor) -> torch.Tensor:
    """`k` [B, keys, heads*d] with other `columns`."""
    if isinstance(columns, tuple):
        return k.index_copy(1, torch.tensor(columns, device=k.device), theirs)
    rest = k[:, theirs.shape[1] :]  # repetitions of the text by the host are equal to it
    return torch.cat([theirs, rest], 1) if rest.shape[1] else theirs


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _in_call(call: UNetCall, entries: list[Entry]) -> tuple[list[Entry], list[int | None]]:
    """The entries in the batch of a call, in its order, and their numbers: None for what is none of them."""
    known = {entry.uuid: number for number, entry in enumerate(entries)}
    numbers = [known.get(uuid) for uuid in call.uuids]
    return [Entry(uuid) if i is None else entries[i] for i, uuid in zip(numbers, call.uuids)], numbers


def _check_maps(q: torch.Tensor, k: torch.Tensor, reference: torch.Tensor, heads: int) -> None:
    if reference.shape != (len(q), heads, q.shape[1], k.shape[1]):
        raise ValueError(
            "model: another node gives the edit's attention another shape than that of the inverted picture, so that the "
            "two cannot be matched. Take out that node, or set guidance_strength to 0."
        )
