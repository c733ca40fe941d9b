"""What the nodes' sockets share: the pack's own types, inputs that several nodes have, and the first of a list."""

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from comfy_api.latest import io

from ..editing.directions import EditDirection
from ..editing.trajectory import Inversion as InvertedPicture
from ..host.networks.captioner import Captioner as CaptionerModel
from ..host.sampling.checks import AUTO, SCHEDULERS

# The names of socket types are part of shared workflow files and never change.
Inversion = io.Custom("P2PZ_INVERSION")
Direction = io.Custom("P2PZ_DIRECTION")
Captioner = io.Custom("P2PZ_CAPTIONER")
KINDS = {
    Inversion.io_type: (InvertedPicture, "Invert Picture"),
    Direction.io_type: (EditDirection, "Edit Direction"),
    Captioner.io_type: (CaptionerModel, "Load Captioner (BLIP)"),
}
"""What comes in there, and the node that makes it."""

Box = io.Custom("BOUNDING_BOX")
"""ComfyUI's own, by name: not all supported versions have its class."""

CATEGORY = "pix2pix-zero"

Item = TypeVar("Item")


seed_input = partial(
    io.Int.Input, "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=io.ControlAfterGenerate.fixed
)
"""Of the nodes that draw something at random. It stays as it is from run to run, so that results are reused."""

start_percent_input = partial(io.Float.Input, "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True)
"""Of the nodes that act in a part of the sampling only."""

scheduler_input = partial(
    io.Combo.Input,
    "scheduler",
    options=[AUTO, *SCHEDULERS],
    default=AUTO,
    optional=True,
    advanced=True,
    tooltip="Which noise levels the steps lie on. auto: ddim_uniform, the paper's, and normal for flow models. simple: for "
    "models that draw in 1 to 8 steps (LCM, Turbo, Lightning, Hyper), since it begins at pure noise and takes exactly as "
    "many steps as you ask for. beta: more steps at both ends. sgm_uniform: as such models were trained.",
)
"""Of the nodes that lay out the steps of an inversion."""

sigmas_input = partial(
    io.Sigmas.Input,
    "sigmas",
    optional=True,
    tooltip="The noise levels themselves, from a scheduler node, for models that have one of their own. steps and "
    "scheduler then do nothing.",
)
"""Of the nodes that lay out steps: noise levels of the user's own."""

edited_latent_output = partial(
    io.Latent.Output, display_name="latent", is_output_list=True, tooltip="The edited picture, for VAE Decode."
)
"""Of the nodes that draw edits, for each picture."""

edited_area_output = partial(
    io.Mask.Output,
    display_name="edited_area",
    is_output_list=True,
    tooltip="Where the picture was allowed to change. Preview it to set local_blend.",
)
"""Beside it: where the edit could change the picture."""


def first(items: Sequence[Item], socket: str) -> Item:
    """The item of a setting that is one for all pictures. Raises ValueError, naming `socket`, for an empty list."""
    if not items:
        raise ValueError(f"{socket}: the list is empty. Connect one with at least one item.")
    return items[0]


def with_defaults(node: type[io.ComfyNode], inputs: dict[str, object]) -> dict[str, object]:
    """The inputs of a node, those that are not given at its own defaults."""
    defaults = {item.id: getattr(item, "default", None) for item in node.GET_SCHEMA().inputs}
    return {**{name: value for name, value in defaults.items() if value is not None}, **inputs}
