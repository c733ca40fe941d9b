"""The memory of a full-size guided pass, counted exactly without a machine that has it.

The pass runs on the meta device, where every operation makes a tensor of the right size and computes nothing. Attention
is counted as the fused kernels of GPUs have it: it keeps its inputs, its output and one number per row. What is left out
is what only a GPU can tell: a convolution's working space and the allocator's rounding.
"""

import math
from collections import defaultdict
from unittest.mock import patch

import comfy.ldm.modules.attention as attention
import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

from ...attention_patches import attention as attention_patches
from ...attention_patches.attention import cross_attention_sites
from ...host.text.conditionings import Entry
from ...host.unet import gradients
from ...host.unet.gradients import differentiable_attention
from ...host.unet.jobs import UNetCall
from ...host.unet.map_jobs import Checkpointing, MatchMaps
from ...host.unet.memory import MODES, graph_memory, map_memory
from .architectures import COMMON, Family
from .live_memory import LiveMemory, storage_of

TOKENS = 77
META = torch.device("meta")
# Cross-attention is called in parts by the transformer block, since there are maps to be read in it.
PARTS = {
    attention.FeedForward: "feed-forward",
    attention.CrossAttention: "self-attention",
    attention.SpatialTransformer: "cross-attention, norms",
    ResBlock: "residual blocks",
}


class FusedAttention(torch.autograd.Function):
    """What a fused kernel allocates and keeps. q, k, v: [B, pixels or tokens, heads*d]."""

    @staticmethod
    def forward(ctx, q, k, v, heads):
        out = torch.empty_like(q)
        normalizers = q.new_empty(q.shape[0], heads, q.shape[1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, normalizers)
        return out

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, *_ = ctx.saved_tensors
        sums = q.new_empty(q.shape, dtype=torch.float32)
        gradients = (
            *(torch.empty_like(t) if needed else None for t, needed in zip((q, k, v), ctx.needs_input_grad)),
            None,
        )
        del sums
        return gradients


def _fused(q, k, v, heads, *args, **kwargs):
    return FusedAttention.apply(q, k, v, heads)


class _AsModel(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.diffusion_model = unet


class _Executor:
    """In place of the host's call of the model, whose noise modes cannot be on the meta device."""

    def __init__(self, unet):
        self.class_obj = _AsModel(unet)

    def __call__(self, x, t, c_concat, c_crossattn, control, transformer_options, **label):
        unet = self.class_obj.diffusion_model
        x = x if c_concat is None else torch.cat([x, c_concat], 1)
        x = x.to(unet.dtype)
        return unet(
            x, t, context=c_crossattn, control=control, transformer_options=transformer_options, **label
        ).float()


class _Reference:
    """Maps of the source, one at a time, as an inversion keeps them."""

    def __init__(self, shapes: dict):
        self.shapes = shapes

    def __contains__(self, key) -> bool:
        return True

    def __getitem__(self, key) -> torch.Tensor:
        return torch.empty(self.shapes[key[1]], device=META)


def account(family: Family, size: int, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Bytes of a guided pass for one picture of size x size pixels, by checkpointing mode and by part.

    `peak` and `estimate` of the pass by mode, `parts` of what the graph keeps without checkpointing, `maps` of the source
    if all are recorded, `plain`: one unguided pass, `weights`.
    """
    settings = COMMON | family.settings
    unet = UNetModel(**settings, dtype=dtype, device=META, operations=comfy.ops.disable_weight_init)
    unet.requires_grad_(False)
    call = _call(unet, settings, size, dtype)
    sites = cross_attention_sites(unet)
    with (
        patch.object(gradients, "attention_pytorch", _fused),
        patch.object(attention_patches, "optimized_attention", lambda q, k, v, heads, **_: _fused(q, k, v, heads)),
    ):
        shapes, plain = _plain_pass(call, sites)
        peaks = {mode: _guided_pass(call, sites, shapes, mode) for mode in MODES}
        parts = _kept_parts(call, sites, shapes)
    latent = call.x.shape
    return {
        "peak": peaks,
        "estimate": {mode: graph_memory(unet, latent, mode, dtype, tokens=TOKENS) for mode in MODES},
        "parts": parts,
        "maps": sum(math.prod(shape) for shape in shapes.values()) * 4,
        "maps_estimate": map_memory(unet, latent, TOKENS),
        "plain": plain,
        "weights": sum(parameter.nbytes for parameter in unet.parameters()),
    }


def _call(unet, settings: dict, size: int, dtype: torch.dtype) -> UNetCall:
    side = size // 8
    label, further = settings["adm_in_channels"], settings["in_channels"] - 4
    arguments = {
        "t": torch.empty(1, device=META),
        "c_concat": torch.empty(1, further, side, side, device=META) if further else None,
        "c_crossattn": torch.empty(1, TOKENS, settings["context_dim"], device=META, dtype=dtype),
        "control": None,
        "y": torch.empty(1, label, device=META, dtype=dtype) if label else None,
    }
    options = {"uuids": [0], "cond_or_uncond": [0], "sigmas": torch.empty(1, device=META)}
    return UNetCall(_Executor(unet), torch.empty(1, 4, side, side, device=META), arguments, options)


def _plain_pass(call: UNetCall, sites: list) -> tuple[dict, int]:
    """The maps' shapes by site, and the peak of an unguided pass."""
    shapes = {}

    def note(site, attention, q, k, v, options):
        shapes[site] = (len(q), options["n_heads"], q.shape[1], k.shape[1])
        return attention(q, k, v, options)

    options = differentiable_attention(call.transformer_options)
    memory = LiveMemory()
    with torch.no_grad():
        call(call.x, attention_patches.with_attention(options, "attn2", sites, note))
        with memory:
            call(call.x, options)
    return shapes, memory.peak


def _job(call: UNetCall, sites: list, shapes: dict, mode: str) -> MatchMaps:
    entries = [Entry(0, tokens=TOKENS)]
    return MatchMaps(sites, entries, _Reference(shapes), call.x, Checkpointing(mode, len(call.x)), stops=False)


def _guided_pass(call: UNetCall, sites: list, shapes: dict, mode: str) -> int:
    memory, job = LiveMemory(), _job(call, sites, shapes, mode)
    with memory:
        job.run(call)
    return memory.peak


def _kept_parts(call: UNetCall, sites: list, shapes: dict) -> dict[str, int]:
    """Bytes that the graph keeps without checkpointing, by the part of the UNet that kept them first."""
    running, kept, known = ["other"], defaultdict(int), []

    def enter(module, args):
        running.append(PARTS.get(type(module), running[-1]))

    def leave(module, args, output):
        running.pop()

    def keep(tensor):
        storage = storage_of(tensor)
        if storage.nbytes() and all(storage is not other for other in known):
            known.append(storage)
            kept[running[-1]] += storage.nbytes()
        return tensor

    unet = call.model.diffusion_model
    handles = [module.register_forward_pre_hook(enter) for module in unet.modules()]
    handles += [module.register_forward_hook(leave) for module in unet.modules()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _job(call, sites, shapes, "none").run(call)
    finally:
        for handle in handles:
            handle.remove()
    return dict(kept)
