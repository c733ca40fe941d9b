"""The nodes a user sees, one file per step of the workflow."""

from comfy_api.latest import ComfyExtension, io

from . import (
    caption,
    demo,
    direction_files,
    directions,
    feature_pca,
    inversion,
    metrics,
    plug_and_play,
    prompt_to_prompt,
    reference,
    sampler,
    sentences,
)

NODES = [
    *caption.NODES,
    *demo.NODES,
    *direction_files.NODES,
    *directions.NODES,
    *feature_pca.NODES,
    *inversion.NODES,
    *metrics.NODES,
    *plug_and_play.NODES,
    *prompt_to_prompt.NODES,
    *reference.NODES,
    *sampler.NODES,
    *sentences.NODES,
]


class Pix2PixZeroExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
