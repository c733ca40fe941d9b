"""Where a UNet attends to the text."""

from typing import NamedTuple

from comfy.ldm.modules.attention import SpatialTransformer


class AttentionSite(NamedTuple):
    """A cross-attention layer, named as ComfyUI's attention patches name it."""

    block: str
    number: int
    index: int


def cross_attention_sites(unet) -> list[AttentionSite]:
    """Every cross-attention layer of ComfyUI's UNetModel in the order of its forward pass.

    SD 1.5 has 16, SDXL has 70 (several per transformer, told apart by `index`).
    """
    groups = (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks))
    return [
        AttentionSite(name, number, index)
        for name, blocks in groups
        for number, block in enumerate(blocks)
        if block is not None
        for layer in block
        if isinstance(layer, SpatialTransformer)
        for index, transformer in enumerate(layer.transformer_blocks)
        if transformer.attn2 is not None
    ]
