"""The decoder's features in UNet calls (Plug-and-Play, Tumanyan et al., CVPR 2023, section 4).

Sites are counted on the UNet at hand, so that every family that ComfyUI's UNetModel can be has them.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

from .attention import AttentionSite, is_unet, layers, with_attention

# In latent pixels a side: SD 1.x's block 4 of its output blocks, which the paper chose, and SDXL's block 1.
FEATURE_STRIDE = 4


class ResidualSite(NamedTuple):
    """What a residual block of the decoder adds to its input: module `index` of `output_blocks[number]`."""

    number: int
    index: int


Site = ResidualSite | AttentionSite
Visit = Callable[[Site, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]


def residual_sites(unet: torch.nn.Module) -> list[ResidualSite]:
    """The residual blocks of the decoder in the order of the forward pass. Raises ValueError for other models."""
    return [site for site, _ in _residual_sites_and_strides(unet)]


def feature_site(unet: torch.nn.Module) -> ResidualSite:
    """The block whose features carry layout but not appearance: the second of those with `FEATURE_STRIDE`.

    A UNet that does not go down so far has it at its coarsest. Raises ValueError for a model that is no UNet.
    """
    blocks = _residual_sites_and_strides(unet)
    stride = max(stride for _, stride in blocks if stride <= FEATURE_STRIDE)
    coarse = [site for site, of_site in blocks if of_site == stride]
    return coarse[min(1, len(coarse) - 1)]


def self_attention_sites(unet: torch.nn.Module, first_block: int = 0) -> list[AttentionSite]:
    """The self-attentions of the decoder from `output_blocks[first_block]` on, in the order of the forward pass.

    Raises ValueError for a model that is no UNet.
    """
    _check(unet)
    return [
        AttentionSite("output", layer.number, index)
        for layer in layers(unet)
        if layer.block == "output" and layer.number >= first_block and isinstance(layer.module, SpatialTransformer)
        for index, transformer in enumerate(layer.module.transformer_blocks)
        if not transformer.disable_self_attn
    ]


def _residual_sites_and_strides(unet: torch.nn.Module) -> list[tuple[ResidualSite, int]]:
    """With each site the latent pixels, along a side, that one of its own pixels stands for."""
    _check(unet)
    return [
        (ResidualSite(layer.number, layer.index), 2**layer.halvings)
        for layer in layers(unet)
        if layer.block == "output" and isinstance(layer.module, ResBlock) and not layer.module.updown
    ]


def _check(unet: torch.nn.Module) -> None:
    if not is_unet(unet):
        raise ValueError(
            "model: it is not a UNet, so it has no decoder whose features could be read. "
            "Use an SD 1.x, SD 2.x or SDXL model."
        )


@contextlib.contextmanager
def tapped(unet: torch.nn.Module, sites: Iterable[Site], visit: Visit, transformer_options: dict) -> Iterator[dict]:
    """While active, the UNet goes on with what `visit(site, tensors)` returns in place of the tensors it is given.

    They are, at a `ResidualSite`, the output of the second convolution [B, C, H, W], ahead of the skip's addition; at
    an `AttentionSite` the self-attention's q, k and v [B, H*W, heads*d]. Yields the transformer options to call the
    UNet with. Nothing stays on the UNet afterwards; a replace patch of another pack still computes the attention.
    """
    sites = list(sites)
    with contextlib.ExitStack() as stack:
        for site in sites:
            if isinstance(site, ResidualSite):
                convolution = unet.output_blocks[site.number][site.index].out_layers[-1]
                stack.enter_context(convolution.register_forward_hook(partial(_visit_output, visit, site)))

        def attend(site, attention, q, k, v, options):
            return attention(*visit(site, (q, k, v)), options)

        attending = [site for site in sites if isinstance(site, AttentionSite)]
        yield with_attention(transformer_options, "attn1", attending, attend)


def _visit_output(visit: Visit, site: ResidualSite, module, args, output: torch.Tensor) -> torch.Tensor:
    (output,) = visit(site, (output,))
    return output
