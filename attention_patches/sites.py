"""The layers of a UNet: where it attends to the text, and how large the picture is there."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample


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


def is_unet(diffusion_model) -> bool:
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
        AttentionSite(layer.block, layer.number, index)
        for layer in layers(unet)
        if isinstance(layer.module, SpatialTransformer)
        for index, transformer in enumerate(layer.module.transformer_blocks)
        if transformer.attn2 is not None
    ]


def attends_to_itself(unet, site: AttentionSite) -> bool:
    """Whether the transformer block of a site has self-attention; a few small models attend to the text twice instead."""
    blocks = {"input": unet.input_blocks, "middle": [unet.middle_block], "output": unet.output_blocks}
    (transformer,) = (layer for layer in blocks[site.block][site.number] if isinstance(layer, SpatialTransformer))
    return not transformer.transformer_blocks[site.index].disable_self_attn


def site_halvings(unet) -> dict[AttentionSite, int]:
    """How often the picture was halved on the way to each transformer block of ComfyUI's UNetModel."""
    return {
        AttentionSite(layer.block, layer.number, index): layer.halvings
        for layer in layers(unet)
        for index in range(len(getattr(layer.module, "transformer_blocks", ())))
    }


def map_shapes(unet, size: tuple[int, int]) -> dict[AttentionSite, tuple[int, int]]:
    """(height, width) of the maps at each cross-attention site for a latent of a size (height, width)."""
    halvings = site_halvings(unet)
    return {site: size_after(halvings[site], size) for site in cross_attention_sites(unet)}
