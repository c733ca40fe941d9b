"""Make the pairs that an edit is distilled from: walk over pictures, and keep each with its edit."""

from comfy_api.latest import io

from ..host.distilled.folder_pictures import ITSELF, folder_names, folder_picture, folder_stamp
from ..host.distilled.pair_sets import pair_up, save_pairs
from .sockets import CATEGORY


class Pix2PixZeroFolderPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroFolderPicture",
            display_name="Picture of a Folder",
            category=CATEGORY,
            description="Loads one picture of a folder, the next at every run. Set the number of runs beside the Run button "
            "to as many as there are pictures.",
            search_aliases=["load images from folder", "batch", "directory", "iterate", "next picture"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=folder_names(),
                    default=ITSELF,
                    tooltip="A folder in ComfyUI's input folder. Its pictures come in the order of their names; folders "
                    "in it are not looked into.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.increment,
                    tooltip="Which picture, 0 is the first. Set it back to 0 to begin again; past the last picture the "
                    "run ends with an error.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture."),
                io.String.Output(display_name="name", tooltip="The name of its file, without the ending."),
                io.Int.Output(display_name="count", tooltip="How many pictures the folder has."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, index: int | None) -> str:
        return folder_stamp(folder, index)

    @classmethod
    def execute(cls, folder: str, index: int) -> io.NodeOutput:
        return io.NodeOutput(*folder_picture(folder, index))


class Pix2PixZeroSavePair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroSavePair",
            display_name="Save Edit Pair",
            category=CATEGORY,
            description="Keeps a picture and its edit for Distill Edit, in output/pix2pix_zero/pairs. The same pair saved "
            "twice is there once.",
            is_input_list=True,
            is_output_node=True,
            search_aliases=["save dataset", "training data", "before after", "distillation"],
            inputs=[
                io.Image.Input("source", tooltip="The picture before the edit, as it went into VAE Encode."),
                io.Image.Input(
                    "edited", tooltip="The edited picture, of the same size. A batch is paired up in order."
                ),
                io.Mask.Input(
                    "edited_area",
                    optional=True,
                    tooltip="Where the edit acts: edited_area of the sampler. The student then looks there most. Leave it "
                    "open for edits of the whole picture, such as day to night.",
                ),
                io.String.Input(
                    "caption",
                    default="",
                    optional=True,
                    tooltip="What the edited picture shows, kept beside it for other trainers; a line for each picture. "
                    "Distill Edit does not read it.",
                ),
                io.String.Input(
                    "dataset",
                    default="my_edit",
                    tooltip="The data set's name. Use one name for one edit and one size of pictures."
                    " At most 100 letters.",
                ),
                io.Boolean.Input(
                    "keep",
                    default=True,
                    optional=True,
                    tooltip="Off: this pair is left out. Connect a comparison here, such as a figure of Edit Metrics above "
                    "a bound, to keep only edits that were made.",
                ),
                io.Boolean.Input(
                    "keep_background",
                    default=True,
                    optional=True,
                    tooltip="On: outside edited_area the source's own pixels are kept, so the student learns to leave "
                    "them alone. Switch it off if edges of the area show. Without edited_area all is the edit's.",
                ),
            ],
            outputs=[
                io.Int.Output(display_name="pairs", tooltip="How many pairs the data set has now."),
                io.String.Output(
                    display_name="dataset",
                    tooltip="The data set's name, for Distill Edit: connected, it trains after these pairs are saved.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, source, edited, dataset, edited_area=(), caption=("",), keep=(True,), keep_background=(True,)
    ) -> io.NodeOutput:
        pairs = pair_up(source, edited, edited_area, caption)
        if len(keep) not in (1, len(pairs)):
            raise ValueError(
                f"keep: it brings {len(keep)} values for {len(pairs)} pictures. Give one, or one for each."
            )
        flags = list(keep) * len(pairs) if len(keep) == 1 else keep
        kept = [pair for pair, flag in zip(pairs, flags) if flag]
        count, places = save_pairs(dataset[0], kept, keep_background[0])
        return io.NodeOutput(count, dataset[0], ui={"text": [f"{dataset[0]}: {count} pairs"], "pairs": places})


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroFolderPicture, Pix2PixZeroSavePair]
