"""Lay edits side by side, and draw one for each of several strengths."""

from comfy_api.latest import io

from ..editing.inputs import check_text
from ..pictures.strips import picture_strip, read_numbers
from .sockets import CATEGORY, first

LONGEST_NAME = 1000


class Pix2PixZeroStrengths(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroStrengths",
            display_name="Strengths (Pix2Pix-Zero)",
            category=CATEGORY,
            description="A list of numbers: what they go to runs once for each. Use it to compare an edit at several "
            "strengths.",
            search_aliases=["sweep", "xy plot", "float list", "compare strengths", "range"],
            inputs=[
                io.String.Input(
                    "values",
                    default="0, 0.5, 1, 1.5",
                    tooltip="The numbers, between commas or on lines of their own. Connect strength to one setting: the "
                    "strength of Apply Direction, or guidance_strength or cfg of the sampler."
                    " At most 100 numbers, since each is a run.",
                ),
                io.String.Input(
                    "name",
                    default="strength",
                    tooltip="What the numbers are. It stands before each of them in the labels; leave it empty for the "
                    "numbers alone."
                    " At most 1000 letters.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="strength", is_output_list=True),
                io.String.Output(
                    display_name="label", is_output_list=True, tooltip="One label per number, for Picture Strip."
                ),
            ],
        )

    @classmethod
    def execute(cls, values: str, name: str) -> io.NodeOutput:
        numbers = read_numbers(values)
        check_text(name, "name", LONGEST_NAME)
        return io.NodeOutput(numbers, [f"{name.strip()} {number:g}".strip() for number in numbers])


class Pix2PixZeroStrip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroStrip",
            display_name="Picture Strip (Pix2Pix-Zero)",
            category=CATEGORY,
            description="Lays pictures side by side with a label under each: before and after, or one edit at several "
            "strengths.",
            is_input_list=True,
            search_aliases=["image grid", "side by side", "before after", "compare images", "labels", "contact sheet"],
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The pictures, a list or a batch. All are shown at the size of the first."
                    " The strip may have at most 64 million pixels.",
                ),
                io.String.Input(
                    "labels",
                    default="",
                    multiline=True,
                    tooltip="What stands under the pictures: a line for each, or the label output of Strengths. Leave it "
                    "empty for none."
                    " At most 10000 letters.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=100,
                    advanced=True,
                    tooltip="Pictures in a row. 0 puts all in one row.",
                ),
                io.Image.Input("source", optional=True, tooltip="The picture before the edit. It comes first."),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls, images, labels, columns, source=()) -> io.NodeOutput:
        return io.NodeOutput(picture_strip(images, labels, first(columns, "columns"), source))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroStrengths, Pix2PixZeroStrip]
