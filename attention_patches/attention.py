"""The layers of a UNet where it attends: where they are, reaching them in one call, their maps, and matching these.

It works beside whatever other packs have patched into the attention. What is installed is on the call's own transformer
options, not on the model: nothing stays behind.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from comfy.ldm.modules.attention import SpatialTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample
from einops import rearrange

from ..editing.guidance import attention_distance, logits_gradient


class AttentionSite(NamedTuple):
    """An attention layer, named as ComfyUI's attention patches name it."""

    block: str
    number: int
    index: int


class Layer(NamedTuple):
    """Module `index` of a block of ComfyUI's UNetModel.

    `halvings`: how often the picture has been halved on the way to the layer's input, along each side.
    """

    block: str
    number: int
    index: int
    module: torch.nn.Module
    halvings: int


def is_unet(diffusion_model: torch.nn.Module) -> bool:
    """Whether it is built of input, middle and output blocks, as ComfyUI's UNetModel is."""
    return hasattr(diffusion_model, "input_blocks")


def layers(unet: torch.nn.Module) -> Iterator[Layer]:
    """The layers of ComfyUI's UNetModel in the order of its forward pass."""
    halvings = 0
    groups = (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks))
    for name, blocks in groups:
        for number, block in enumerate(blocks):
            for index, module in enumerate(block if block is not None else ()):
                yield Layer(name, number, index, module, halvings)
                halvings += _halvings(module)


def _halvings(module: torch.nn.Module) -> int:
    """1 for a layer that halves the picture, -1 for one that doubles it."""
    if isinstance(module, ResBlock) and module.updown:  # of a UNet with resblock_updown
        module = module.h_upd
    return isinstance(module, Downsample) - isinstance(module, Upsample)


def size_after(halvings: int, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a latent's size (height, width) after so many halvings."""
    return tuple(math.ceil(side / 2**halvings) for side in size)


def cross_attention_sites(unet: torch.nn.Module) -> list[AttentionSite]:
    """Every cross-attention layer of ComfyUI's UNetModel in the order of its forward pass.

    SD 1.x and 2.x have 16, SDXL has 70 (several per transformer, told apart by `index`). Raises ValueError for a model
    without any, such as a diffusion transformer.
    """
    if not is_unet(unet):
        raise ValueError(
            "model: it is not a UNet with cross-attention (but a diffusion transformer, perhaps), so there are no maps to "
            "guide it by. Use an SD 1.x, SD 2.x or SDXL model."
        )
    return [
        AttentionSite(layer.block, layer.number, index)
        for layer in layers(unet)
        if isinstance(layer.module, SpatialTransformer)
        for index, transformer in enumerate(layer.module.transformer_blocks)
        if transformer.attn2 is not None
    ]


def attends_to_itself(unet: torch.nn.Module, site: AttentionSite) -> bool:
    """Whether the transformer block of a site has self-attention; a few small models attend to the text twice instead."""
    blocks = {"input": unet.input_blocks, "middle": [unet.middle_block], "output": unet.output_blocks}
    (transformer,) = (layer for layer in blocks[site.block][site.number] if isinstance(layer, SpatialTransformer))
    return not transformer.transformer_blocks[site.index].disable_self_attn


def site_halvings(unet: torch.nn.Module) -> dict[AttentionSite, int]:
    """How often the picture was halved on the way to each transformer block of ComfyUI's UNetModel."""
    return {
        AttentionSite(layer.block, layer.number, index): layer.halvings
        for layer in layers(unet)
        for index in range(len(getattr(layer.module, "transformer_blocks", ())))
    }


def map_shapes(unet: torch.nn.Module, size: tuple[int, int]) -> dict[AttentionSite, tuple[int, int]]:
    """(height, width) of the maps at each cross-attention site for a latent of a size (height, width)."""
    halvings = site_halvings(unet)
    return {site: size_after(halvings[site], size) for site in cross_attention_sites(unet)}


@contextlib.contextmanager
def own_attribute(module: torch.nn.Module, name: str, value) -> Iterator[None]:
    """While active, `module` itself has this attribute; afterwards what it had, be it its own or its class's."""
    had, before = name in module.__dict__, module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            module.__dict__[name] = before
        else:
            del module.__dict__[name]


class LastSiteReached(Exception):  # noqa: N818 - a signal, not an error
    """Raised out of the UNet once everything is read, so that the rest of the call is not computed."""


def with_attention(transformer_options: dict, kind: str, sites: Iterable[AttentionSite], attend: Callable) -> dict:
    """A copy of `transformer_options` in which `attend(site, attention, q, k, v, options)` gives the output at `sites`.

    `kind`: "attn1" for self-attention, "attn2" for cross-attention. `attention(q, k, v, options)`: what would have given
    the output otherwise, a replace patch of another pack or the host's own attention. `options["n_heads"]`: its heads.
    """
    replace = transformer_options.get("patches_replace", {})
    theirs = replace.get(kind, {})
    ours = {site: partial(attend, site, theirs.get(site, theirs.get(site[:2], _host_attention))) for site in sites}
    return {**transformer_options, "patches_replace": {**replace, kind: {**theirs, **ours}}}


def _host_attention(q, k, v, options):
    precision = options.get("attn_precision")
    return optimized_attention(q, k, v, options["n_heads"], attn_precision=precision, transformer_options=options)


def attention_maps(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) in fp32: [B, heads, pixels, tokens].

    `q`: [B, pixels, heads*d], `k`: [B, tokens, heads*d].
    """
    q, k = by_head(q, heads), by_head(k, heads)
    return (q @ k.mT).mul_(q.shape[-1] ** -0.5).softmax(-1)


def by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, n, heads*d] as fp32 [B, heads, n, d]."""
    return rearrange(tensor.float(), "b n (h d) -> b h n d", h=heads)


def joined(tensor: torch.Tensor) -> torch.Tensor:
    """[B, heads, n, d] as [B, n, heads*d]."""
    return rearrange(tensor, "b h n d -> b n (h d)")


def maps_of_first(maps: torch.Tensor, tokens: int) -> torch.Tensor:
    """The maps [..., tokens] that `maps` [..., more tokens] would be if the text ended after so many.

    A softmax over some of the logits is that part of the whole one, scaled to sum to 1.
    """
    first = maps[..., :tokens]
    return first / first.sum(-1, keepdim=True).clamp_min(torch.finfo(first.dtype).tiny)


class GradientScale:
    """A factor on the distance that keeps gradients inside fp16's range; `value` may be set until the backward pass.

    `overflows`: how often a gradient has left the range so far. `largest`: of the gradients that will be injected; None
    in other precisions, which need no factor.
    """

    def __init__(self, overflows: int = 0):
        self.overflows = overflows
        self.value = 1.0
        self.largest = None

    def note(self, gradient: torch.Tensor) -> None:
        """Remember the largest magnitude of the gradients that will be injected."""
        largest = gradient.abs().max()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def settle(self) -> None:
        """Set `value` to the power of two that puts the largest gradient near 16, and less after each overflow."""
        if self.largest is not None:
            exponent = math.frexp(float(self.largest))[1]  # not every device has torch.frexp
            self.value = 2.0 ** (4 - exponent - 6 * self.overflows)

    def holds(self, gradient: torch.Tensor) -> bool:
        """Whether a gradient taken at this scale has kept inside the range."""
        return self.largest is None or bool(gradient.isfinite().all())


class MatchedAttention(torch.autograd.Function):
    """(q, k, distance): q and k unchanged, but a backward pass through them adds `scale` times the distance's gradient.

    `q`: [B, pixels, heads*d], `k`: [B, tokens, heads*d], `reference`: [B, heads, pixels, tokens] rows summing to 1.
    `distance`: [B] as `attention_distance`, outside the graph.

    The distance is a sum over sites, and at each site its gradient with respect to q and k has a closed form. So the
    graph holds one tensor of q's size per site in place of the maps, logits and differences.
    """

    @staticmethod
    def forward(ctx, q, k, reference, heads, scale):
        with torch._C.DisableTorchFunction():  # no graph is recorded here: the rules for a model's layers may rest
            maps = attention_maps(q, k, heads)
            distance = attention_distance(maps, reference)
            logits = logits_gradient(maps, reference).mul_((q.shape[-1] // heads) ** -0.5)
            q_gradient = joined(logits @ by_head(k, heads)) if ctx.needs_input_grad[0] else None
            k_gradient = joined(logits.mT @ by_head(q, heads)) if ctx.needs_input_grad[1] else None
        ctx.scale = scale
        if q.dtype == torch.float16:
            scale.note(q_gradient if k_gradient is None else k_gradient)
        ctx.save_for_backward(q_gradient, k_gradient)  # not as attributes: checkpointing drops what is saved
        ctx.mark_non_differentiable(distance)
        return q.view_as(q), k.view_as(k), distance

    @staticmethod
    def backward(ctx, from_q, from_k, _):
        q_gradient, k_gradient = ctx.saved_tensors
        return _plus(from_q, q_gradient, ctx.scale), _plus(from_k, k_gradient, ctx.scale), None, None, None


def _plus(theirs: torch.Tensor, ours: torch.Tensor | None, scale: GradientScale) -> torch.Tensor | None:
    return None if ours is None else (theirs + scale.value * ours).to(theirs.dtype)
