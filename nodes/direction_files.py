"""Keep an edit direction in a file and use it again in another workflow."""

from comfy_api.latest import io

from ..host.messages import SAVED
from ..host.running import tell
from ..host.text.direction_files import (
    direction_names,
    direction_path,
    fingerprint,
    load_direction,
    register_directions_folder,
    save_direction,
)
from .sockets import CATEGORY, Direction

register_directions_folder()


class Pix2PixZeroSaveDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroSaveDirection",
            display_name="Save Direction",
            category=CATEGORY,
            description="Save an edit direction in models/pix2pix_zero/directions. Earlier files are never overwritten.",
            search_aliases=["export direction", "store direction"],
            inputs=[
                Direction.Input("direction", tooltip="The direction to keep."),
                io.String.Input(
                    "filename_prefix",
                    default="direction",
                    tooltip="The file's name without its number. A slash makes a subfolder: animals/cat2dog.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, direction, filename_prefix: str) -> io.NodeOutput:
        path = save_direction(direction, filename_prefix)
        tell(SAVED.format(file=path.name))
        return io.NodeOutput()


class Pix2PixZeroLoadDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroLoadDirection",
            display_name="Load Direction",
            category=CATEGORY,
            description="Load an edit direction that Save Direction wrote.",
            search_aliases=["import direction"],
            inputs=[
                io.Combo.Input(
                    "direction_name",
                    options=direction_names(),
                    tooltip="A file in models/pix2pix_zero/directions. It works with the text encoder it was made with.",
                )
            ],
            outputs=[Direction.Output(display_name="direction", tooltip="The saved direction, for Apply Direction.")],
        )

    @classmethod
    def validate_inputs(cls, direction_name: str | None) -> bool | str:
        """Whether there is such a file, however the system that wrote the workflow divides folders; else why not."""
        try:
            return direction_name is None or bool(direction_path(direction_name))  # None: it comes by a link
        except ValueError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, direction_name: str | None) -> str:
        return fingerprint(direction_name)

    @classmethod
    def execute(cls, direction_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_direction(direction_name))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroSaveDirection, Pix2PixZeroLoadDirection]
