"""Where a UNet attends to the text, and how large the picture is there."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample


class AttentionSite(NamedTuple):
    """A cross-attention layer, named as ComfyUI's attention patches name it."""

    block: str
    number: int
    index: int


def is_unet(diffusion_model) -> bool:
    """Whether it is built of input, middle and output blocks, as ComfyUI's UNetModel is."""
    return hasattr(diffusion_model, "input_blocks")


def named_layers(unet: torch.nn.Module) -> Iterator[tuple[str, int, torch.nn.Module]]:
    """(block name, number, layer) of ComfyUI's UNetModel in the order of its forward pass."""
    groups = (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks))
    for name, blocks in groups:
        for number, block in enumerate(blocks):
            for layer in block if block is not None else ():
                yield name, number, layer


def cross_attention_sites(unet) -> list[AttentionSite]:
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
        AttentionSite(name, number, index)
        for name, number, layer in named_layers(unet)
        if isinstance(layer, SpatialTransformer)
        for index, transformer in enumerate(layer.transformer_blocks)
        if transformer.attn2 is not None
    ]


def attends_to_itself(unet, site: AttentionSite) -> bool:
    """Whether the transformer block of a site has self-attention; a few small models attend to the text twice instead."""
    blocks = {"input": unet.input_blocks, "middle": [unet.middle_block], "output": unet.output_blocks}
    (transformer,) = (layer for layer in blocks[site.block][site.number] if isinstance(layer, SpatialTransformer))
    return not transformer.transformer_blocks[site.index].disable_self_attn


def site_levels(unet) -> dict[AttentionSite, int]:
    """How often the picture was halved on the way to each attention site of ComfyUI's UNetModel."""
    levels = {}
    level = 0
    for name, number, layer in named_layers(unet):
        level += isinstance(layer, Downsample) - isinstance(layer, Upsample)
        for index in range(len(getattr(layer, "transformer_blocks", ()))):
            levels[AttentionSite(name, number, index)] = level
    return levels


def map_shapes(unet, size: tuple[int, int]) -> dict[AttentionSite, tuple[int, int]]:
    """(height, width) of the maps at each cross-attention site for a latent of a size (height, width)."""
    levels = site_levels(unet)
    return {site: tuple(math.ceil(side / 2 ** levels[site]) for side in size) for site in cross_attention_sites(unet)}
