"""Where a UNet attends to the text."""

from typing import NamedTuple

from comfy.ldm.modules.attention import SpatialTransformer


class AttentionSite(NamedTuple):
    """A cross-attention layer, named as ComfyUI's attention patches name it."""

    block: str
    number: int
    index: int


def is_unet(diffusion_model) -> bool:
    """Whether it is built of input, middle and output blocks, as ComfyUI's UNetModel is."""
    return hasattr(diffusion_model, "input_blocks")


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


def attends_to_itself(unet, site: AttentionSite) -> bool:
    """Whether the transformer block of a site has self-attention; a few small models attend to the text twice instead."""
    blocks = {"input": unet.input_blocks, "middle": [unet.middle_block], "output": unet.output_blocks}
    (transformer,) = (layer for layer in blocks[site.block][site.number] if isinstance(layer, SpatialTransformer))
    return not transformer.transformer_blocks[site.index].disable_self_attn
