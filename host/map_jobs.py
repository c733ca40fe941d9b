"""Record or match cross-attention maps in UNet calls that go through ComfyUI's own conditioning batches.

A job travels in `transformer_options`; a wrapper around `apply_model` carries it out. Everything above that call, the
hooks, areas, ControlNets and masks of the conditioning, runs as in any other sampler and stays in inference mode.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.model_management import soft_empty_cache
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP, copy_nested_dicts

from ..attention_patches.maps import AttentionTap, LastSiteReached, attention_maps
from ..attention_patches.matching import GradientScale, match_maps
from ..attention_patches.sites import AttentionSite
from ..editing.guidance import Maps
from .checkpointing import LEVELS, checkpointed
from .gradients import differentiable_attention, input_gradients, ordinary, uncompiled, unshared_skips
from .memory import is_out_of_memory

JOB = "pix2pix_zero_job"


def with_map_jobs(model):
    """A clone of the MODEL whose UNet calls carry out the job in their transformer options, if there is one."""
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, JOB, _run_job)
    return model


class Checkpointing:
    """The checkpointing level of an edit's guided passes; it rises when memory runs out, and stays there."""

    def __init__(self, level: str):
        self.level = level

    def tighten(self) -> bool:
        """Go to the level that needs the least memory. False if it is that already."""
        if self.level == LEVELS[-1]:
            return False
        logging.warning(
            "Pix2Pix-Zero: out of memory in a guided step. The edit goes on with less memory and more time, as in the "
            "preset 'low memory'."
        )
        self.level = LEVELS[-1]
        return True


@dataclass
class UNetCall:
    """One call of ComfyUI's `apply_model`, held back by a wrapper."""

    executor: Callable
    x: torch.Tensor
    arguments: dict
    transformer_options: dict

    @property
    def model(self):
        return self.executor.class_obj

    @property
    def uuids(self) -> list:
        """Of the conditioning entries in the batch, in order."""
        return self.transformer_options["uuids"]

    def __call__(self, x: torch.Tensor, transformer_options: dict, convert=lambda value: value) -> torch.Tensor:
        arguments = {name: convert(value) for name, value in self.arguments.items()}
        c_concat, c_crossattn, control = (arguments.pop(name) for name in ("c_concat", "c_crossattn", "control"))
        return self.executor(x, arguments.pop("t"), c_concat, c_crossattn, control, transformer_options, **arguments)


def _run_job(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    if x.device.type == "cpu":  # faster and leaner there than the host's choice, sub-quadratic attention
        transformer_options = differentiable_attention(transformer_options)
    arguments = {"t": t, "c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **kwargs}
    call = UNetCall(executor, x, arguments, transformer_options)
    job = transformer_options.get(JOB)
    return call(x, transformer_options) if job is None else job.run(call)


class RecordMaps:
    """Job: hand the maps to `keep((entry of the conditioning, site), maps)`, fp32 [B, heads, H*W, tokens].

    `stop`: skip the rest of the UNet and return zeros. Without it, the output is that of an ordinary call.
    """

    def __init__(self, sites: list[AttentionSite], entries: list, keep: Callable, stop: bool):
        self.sites = sites
        self.entries = entries
        self.keep = keep
        self.stop = stop

    def run(self, call: UNetCall) -> torch.Tensor:
        def visit(site, q, k, heads):
            maps = attention_maps(q, k, heads).chunk(len(call.uuids))
            for uuid, part in zip(call.uuids, maps):
                self.keep((self.entries.index(uuid), site), part)
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

    `stop`: skip the rest of the UNet and return zeros. Without it, the output is that of an ordinary call; no graph is
    recorded past the last site.
    """

    def __init__(
        self,
        sites: list[AttentionSite],
        entries: list,
        areas: list,
        reference: Maps,
        x: torch.Tensor,
        checkpointing: Checkpointing,
        stop: bool,
    ):
        self.sites = sites
        self.entries = entries
        self.areas = areas
        self.reference = reference
        self.checkpointing = checkpointing
        self.stop = stop
        self.gradient = torch.zeros_like(x)
        self.distance = x.new_zeros(len(x))

    def run(self, call: UNetCall) -> torch.Tensor:
        entries = [self.entries.index(uuid) for uuid in call.uuids]
        output, gradient, distances = self._within_memory(call, entries)
        for entry, part, amount in zip(entries, gradient.chunk(len(entries)), distances.chunk(len(entries))):
            _narrow(self.gradient, self.areas[entry]).add_(part)
            self.distance += amount
        return output

    def _within_memory(self, call: UNetCall, entries: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        while True:
            try:
                with (
                    input_gradients(call.model),
                    checkpointed(call.model.diffusion_model, self.checkpointing.level, self.sites[-1]),
                ):
                    return self._differentiate(call, entries)
            except Exception as error:
                if not (is_out_of_memory(error) and self.checkpointing.tighten()):
                    raise
            # Here the exception and the tensors of its frames are gone.
            soft_empty_cache()

    def _differentiate(self, call: UNetCall, entries: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = call.x.clone().requires_grad_(True)
        scale = GradientScale()
        distances = {}
        last_q = None

        def visit(site, q, k, heads):
            nonlocal last_q
            reference = torch.cat([self.reference[entry, site] for entry in entries])
            if reference.shape != (len(q), heads, q.shape[1], k.shape[1]):
                raise ValueError(
                    "positive: its text is encoded to another number of tokens than the caption the picture was "
                    "inverted with. Make it from the same caption, with Apply Edit Direction, or shorten the text."
                )
            q, k, distances[site] = match_maps(q, k, reference, heads, scale)
            if site == self.sites[-1]:
                last_q = q
                if self.stop:
                    raise LastSiteReached
                torch.set_grad_enabled(False)  # until `input_gradients` ends
            return q, k

        options = differentiable_attention(call.transformer_options)
        if call.arguments["control"] is not None:
            options = unshared_skips(options)
        try:
            output = call(x, AttentionTap(self.sites, visit).install(options), ordinary)
        except LastSiteReached:
            output = torch.zeros_like(x)
        return output.detach(), _gradient(last_q, x, scale), sum(distances.values())


def _gradient(last_q: torch.Tensor, x: torch.Tensor, scale: GradientScale) -> torch.Tensor:
    """Run the backward pass from the last site; the distance enters it at every site.

    In fp16 the scale is the power of two that puts the largest injected gradient near 16, lowered while that overflows.
    """
    if scale.largest is None:
        return torch.autograd.grad(last_q, x, torch.zeros_like(last_q))[0]
    exponent = 4 - int(torch.frexp(scale.largest).exponent)
    for _ in range(4):
        scale.value = 2.0**exponent
        (gradient,) = torch.autograd.grad(last_q, x, torch.zeros_like(last_q), retain_graph=True)
        if gradient.isfinite().all():
            return gradient / scale.value
        exponent -= 6
    raise ValueError(
        "model: the gradient of its attention maps overflows in fp16. Load the model in bf16 or fp32 for guided sampling."
    )


def _narrow(tensor: torch.Tensor, area) -> torch.Tensor:
    """The view of `tensor` that a conditioning area (sizes, then offsets) covers; all of it when there is none."""
    if area is None:
        return tensor
    dims = len(area) // 2
    for i in range(dims):
        tensor = tensor.narrow(i + 2, area[dims + i], min(area[i], tensor.shape[i + 2] - area[dims + i]))
    return tensor


def attention_state(model) -> tuple:
    """What decides the maps that a MODEL draws, beside its weights: equal for clones that are patched alike."""
    patches = model.model_options["transformer_options"]
    return model.patches_uuid, *(copy_nested_dicts(patches.get(name, {})) for name in ("patches", "patches_replace"))


def with_job(model_options: dict, job) -> dict:
    """Model options under which the UNet calls of a MODEL from `with_map_jobs` carry out `job`."""
    options = create_model_options_clone(model_options)
    options["transformer_options"][JOB] = job
    return options
