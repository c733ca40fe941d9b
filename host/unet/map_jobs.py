"""Record or match cross-attention maps in UNet calls that go through ComfyUI's own conditioning batches.

A job travels in `transformer_options`; a wrapper around `apply_model` carries it out. Everything above that call, the
hooks, areas, ControlNets and masks of the conditioning, runs as in any other sampler and stays in inference mode.
"""

import logging
import math
from collections.abc import Callable

import torch
from comfy.model_management import soft_empty_cache
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP, copy_nested_dicts

from ...attention_patches.maps import AttentionTap, LastSiteReached, attention_maps, maps_of_first
from ...attention_patches.matching import GradientScale, match_maps
from ...attention_patches.sites import AttentionSite
from ...editing.guidance import Maps
from ..methods.plug_and_play import JOB as PLUG_AND_PLAY
from ..methods.plug_and_play import with_jobs
from .calls import UNetCall
from .checkpointing import LEVELS, checkpointed
from .entries import Entry, narrowed, own_tokens
from .gradients import (
    careful_block_patches,
    differentiable_attention,
    input_gradients,
    ordinary,
    uncompiled,
    unshared_skips,
)
from .memory import is_out_of_memory

JOB = "pix2pix_zero_job"


def with_map_jobs(model):
    """A clone of the MODEL whose UNet calls carry out the job in their transformer options, if there is one."""
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, JOB, _run_job)
    # The later wrapper is the inner one: Plug-and-Play sees the parts that a job divides a call into.
    return with_jobs(model) if model.get_wrappers(WrappersMP.APPLY_MODEL, PLUG_AND_PLAY) else model


class Checkpointing:
    """What an edit's guided passes do for memory; it is tightened when memory runs out, and stays so.

    `level`: see `checkpointing.checkpointed`. `rows`: how many pictures are worked on at once, each entry of the
    conditioning counting as one.
    """

    def __init__(self, level: str, rows: int):
        self.level = level
        self.rows = rows

    def tighten(self, rows: int) -> bool:
        """Go to what needs the least memory for `rows`, then to fewer of them. False if there is nothing left."""
        if self.level == LEVELS[-1] and rows == 1:
            return False
        if self.level == LEVELS[-1]:
            self.rows = math.ceil(rows / 2)
        self.level = LEVELS[-1]
        logging.warning(
            "Pix2Pix-Zero: out of memory in a guided step. The edit goes on with less memory and more time, as in the "
            "preset 'low memory'."
        )
        return True


def _run_job(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    if x.device.type == "cpu":  # faster and leaner there than the host's choice, sub-quadratic attention
        transformer_options = differentiable_attention(transformer_options)
    arguments = {"t": t, "c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **kwargs}
    call = UNetCall(executor, x, arguments, transformer_options)
    job = transformer_options.get(JOB)
    return call(x, transformer_options) if job is None else job.run(call)


class RecordMaps:
    """Job: hand the maps to `keep((number of the entry, site), maps)`, fp32 [B, heads, H*W, tokens].

    `stop`: skip the rest of the UNet and return zeros. Without it, the output is that of an ordinary call.
    """

    def __init__(self, sites: list[AttentionSite], entries: list[Entry], keep: Callable, stop: bool):
        self.sites = sites
        self.entries = entries
        self.keep = keep
        self.stop = stop

    def run(self, call: UNetCall) -> torch.Tensor:
        entries, numbers = _in_call(call, self.entries)

        def visit(site, q, k, heads):
            lengths = own_tokens(k.shape[1], entries)
            rows = zip(numbers, lengths, q.chunk(len(numbers)), k.chunk(len(numbers)))
            for number, tokens, part_q, part_k in rows:
                if number is not None:
                    self.keep((number, site), attention_maps(part_q, part_k[:, :tokens], heads))
            if self.stop and site == self.sites[-1]:
                raise LastSiteReached
            return q, k

        try:
            with uncompiled(call.model):
                return call(call.x, AttentionTap(self.sites, visit).install(call.transformer_options))
        except LastSiteReached:
            return torch.zeros_like(call.x)


class MatchMaps:
    """Job: the attention distance to `reference`, `distance` [B], and its `gradient` [B, C, H, W] afterwards.

    Where several entries draw, each counts as much as its share of the estimate; one without a reference is not guided.
    Texts of unequal length are compared over the tokens that both have, as if the longer one ended there: what the words
    after them draw is left free. To repeat both to one length, as the host does in a batch, would ask those words for the
    maps of others that stand in their place by chance; to compare the maps as they are, to draw nothing.
    `stop`: skip the rest of the UNet and return zeros. Without it, the output is that of an ordinary call; no graph is
    recorded past the last site.
    """

    def __init__(
        self,
        sites: list[AttentionSite],
        entries: list[Entry],
        reference: Maps,
        x: torch.Tensor,
        checkpointing: Checkpointing,
        stop: bool,
    ):
        self.sites = sites
        self.entries = entries
        self.reference = reference
        self.checkpointing = checkpointing
        self.stop = stop
        self.gradient = torch.zeros_like(x)
        self.distance = x.new_zeros(len(x))

    def run(self, call: UNetCall) -> torch.Tensor:
        entries, numbers = _in_call(call, self.entries)
        if any(
            (len(call.x), *call.x.shape[2:]) != (len(numbers) * len(target), *target.shape[2:])
            for target in (narrowed(self.gradient, entry.area) for entry, i in zip(entries, numbers) if i is not None)
        ):
            raise ValueError(
                "model: another node cuts the picture or the batch into parts of its own for the UNet, so that its "
                "attention cannot be matched. Take out that node, or set guidance_strength to 0."
            )
        return self._run(call)

    def _run(self, call: UNetCall) -> torch.Tensor:
        return torch.cat([self._within_memory(part) for part in call.parts(self.checkpointing.rows)])

    def _within_memory(self, call: UNetCall) -> torch.Tensor:
        entries, numbers = _in_call(call, self.entries)
        if not any((number, self.sites[0]) in self.reference for number in numbers):
            return torch.zeros_like(call.x) if self.stop else call(call.x, call.transformer_options)
        try:
            with (
                input_gradients(call.model),
                checkpointed(call.model.diffusion_model, self.checkpointing.level, self.sites[-1]),
            ):
                output, gradient, distances = self._differentiate(call, entries, numbers)
        except Exception as error:
            if not (is_out_of_memory(error) and self.checkpointing.tighten(len(call.x))):
                raise
        else:
            for number, part, amount in zip(numbers, gradient.chunk(len(numbers)), distances):
                if number is not None:
                    self._add(self.entries[number], call, part, amount)
            return output
        # Here the exception and the tensors of its frames are gone.
        soft_empty_cache()
        return self._run(call)

    def _add(self, entry: Entry, call: UNetCall, gradient: torch.Tensor, distance: torch.Tensor) -> None:
        pictures = slice(call.first, call.first + call.pictures)
        if entry.share is not None:
            share = entry.share[pictures]
            gradient = gradient * share
            distance = distance * share.sum((1, 2, 3)) / self.gradient[0, 0].numel()
        narrowed(self.gradient, entry.area)[pictures].add_(gradient)
        self.distance[pictures] += distance

    def _differentiate(
        self, call: UNetCall, entries: list[Entry], numbers: list[int | None]
    ) -> tuple[torch.Tensor, torch.Tensor, list]:
        x = call.x.clone().requires_grad_(True)
        matching = _Matching(self, call, entries, numbers)
        options = careful_block_patches(differentiable_attention(call.transformer_options))
        if call.arguments["control"] is not None:
            options = unshared_skips(options)
        try:
            output = call(x, AttentionTap(self.sites, matching.visit).install(options), ordinary)
        except LastSiteReached:
            output = torch.zeros_like(x)
        gradient = _gradient(matching.last_q, x, matching.scale)
        distances = [sum(of_entry.values(), x.new_zeros(())) for of_entry in matching.distances]
        return output.detach(), gradient, distances


class _Matching:
    """What one differentiated call does at each site. `distances`: of each entry in it, by site.

    `last_q`: what the backward pass starts from.
    """

    def __init__(self, job: MatchMaps, call: UNetCall, entries: list[Entry], numbers: list[int | None]):
        self.job = job
        self.pictures = slice(call.first, call.first + call.pictures)
        self.entries = entries
        self.numbers = numbers
        self.scale = GradientScale()
        self.distances = [{} for _ in numbers]
        self.last_q = None

    def visit(self, site: AttentionSite, q: torch.Tensor, k: torch.Tensor, heads: int) -> tuple:
        lengths = own_tokens(k.shape[1], self.entries)
        queries, keys = (list(tensor.chunk(len(self.numbers))) for tensor in (q, k))
        for i, (number, tokens) in enumerate(zip(self.numbers, lengths)):
            if (number, site) in self.job.reference:
                queries[i], keys[i] = self._match(i, site, queries[i], keys[i], tokens, heads)
        q, k = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in (queries, keys))
        if site == self.job.sites[-1]:
            self.last_q = q
            if self.job.stop:
                raise LastSiteReached
            torch.set_grad_enabled(False)  # until `input_gradients` ends
        return q, k

    def _match(self, i: int, site: AttentionSite, q: torch.Tensor, k: torch.Tensor, tokens: int, heads: int) -> tuple:
        reference = self.job.reference[self.numbers[i], site][self.pictures]
        shared = self.entries[i].shared_tokens
        if shared is None:
            parts = [self._match_first(tokens, q, k, reference, heads)]
        elif len(set(shared)) == 1:
            parts = [self._match_first(shared[0], q, k, maps_of_first(reference, shared[0]), heads)]
        else:
            rows = zip(shared[self.pictures], q.split(1), k.split(1), reference.split(1))
            parts = [self._match_first(n, *row, maps_of_first(maps, n), heads) for n, *row, maps in rows]
        q, k, self.distances[i][site] = (torch.cat(each) if len(each) > 1 else each[0] for each in zip(*parts))
        return q, k

    def _match_first(self, tokens: int, q: torch.Tensor, k: torch.Tensor, reference: torch.Tensor, heads: int) -> tuple:
        own = k[:, :tokens]
        _check_maps(reference, q, own, heads)
        q, own, distance = match_maps(q, own, reference, heads, self.scale)
        # Repetitions of the text by the host are equal to it.
        return q, own if own.shape == k.shape else torch.cat([own, k[:, tokens:]], 1), distance


def _in_call(call: UNetCall, entries: list[Entry]) -> tuple[list[Entry], list[int | None]]:
    """The entries in the batch of a call, in its order, and their numbers: None for what another pack has made up."""
    known = {entry.uuid: number for number, entry in enumerate(entries)}
    numbers = [known.get(uuid) for uuid in call.uuids]
    return [Entry(uuid) if i is None else entries[i] for i, uuid in zip(numbers, call.uuids)], numbers


def _check_maps(reference: torch.Tensor, q: torch.Tensor, k: torch.Tensor, heads: int) -> None:
    if reference.shape != (len(q), heads, q.shape[1], k.shape[1]):
        raise ValueError(
            "model: another node gives the edit's attention another shape than that of the inverted picture, so that the "
            "two cannot be matched. Take out that node, or set guidance_strength to 0."
        )


def _gradient(last_q: torch.Tensor, x: torch.Tensor, scale: GradientScale) -> torch.Tensor:
    """Run the backward pass from the last site; the distance enters it at every site.

    In fp16 the scale is the power of two that puts the largest injected gradient near 16, lowered while that overflows.
    """
    if scale.largest is None:
        return torch.autograd.grad(last_q, x, torch.zeros_like(last_q))[0]
    exponent = 4 - math.frexp(float(scale.largest))[1]  # not every device has torch.frexp
    for _ in range(4):
        scale.value = 2.0**exponent
        (gradient,) = torch.autograd.grad(last_q, x, torch.zeros_like(last_q), retain_graph=True)
        if gradient.isfinite().all():
            return gradient / scale.value
        exponent -= 6
    raise ValueError(
        "model: the gradient of its attention maps overflows in fp16. Load the model in bf16 or fp32 for guided sampling."
    )


def attention_state(model) -> tuple:
    """What decides the maps that a MODEL draws, beside its weights: equal for clones that are patched alike."""
    patches = model.model_options["transformer_options"]
    return model.patches_uuid, *(copy_nested_dicts(patches.get(name, {})) for name in ("patches", "patches_replace"))


def with_job(model_options: dict, job) -> dict:
    """Model options under which the UNet calls of a MODEL from `with_map_jobs` carry out `job`."""
    options = create_model_options_clone(model_options)
    options["transformer_options"][JOB] = job
    return options
