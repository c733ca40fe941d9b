"""ComfyUI-Pix2PixZero: prompt-free, training-free image editing by concept."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import Pix2PixZeroExtension

    return Pix2PixZeroExtension()
