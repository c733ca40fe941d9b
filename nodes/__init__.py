"""The nodes a user sees, one file per step of the workflow."""

from comfy_api.latest import ComfyExtension, io

from ..host.running import entered
from . import (
    attention_heatmap,
    caption,
    demo,
    direction_files,
    directions,
    distillation,
    feature_pca,
    flow_edit,
    inversion,
    metrics,
    noise_report,
    pairs,
    paste,
    plug_and_play,
    prompt_to_prompt,
    reference,
    sampler,
    sentences,
    strip,
)
from .sockets import KINDS

NODES = [
    *attention_heatmap.NODES,
    *caption.NODES,
    *demo.NODES,
    *direction_files.NODES,
    *directions.NODES,
    *distillation.NODES,
    *feature_pca.NODES,
    *flow_edit.NODES,
    *inversion.NODES,
    *metrics.NODES,
    *noise_report.NODES,
    *pairs.NODES,
    *paste.NODES,
    *plug_and_play.NODES,
    *prompt_to_prompt.NODES,
    *reference.NODES,
    *sampler.NODES,
    *sentences.NODES,
    *strip.NODES,
]
for _node in NODES:
    entered(_node, KINDS)


class Pix2PixZeroExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
