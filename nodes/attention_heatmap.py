"""Show where in an inverted picture the model reads each word (the maps that guide pix2pix-zero, section 3.3)."""

from comfy_api.latest import io

from ..host.running import per_picture
from ..host.views.attention_heat import RESOLUTIONS, HeatmapSettings, attention_heatmaps
from .sockets import CATEGORY, Inversion, start_percent_input


class Pix2PixZeroAttentionHeatmap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroAttentionHeatmap",
            display_name="Attention Heatmap (Pix2Pix-Zero)",
            category=CATEGORY,
            description="Shows where in an inverted picture the model reads each word of the caption: the maps that hold "
            "the layout during an edit. A word that lights up the wrong place cannot be edited well.",
            is_input_list=True,
            search_aliases=["attention map", "cross-attention", "daam", "word heatmap", "visualize attention"],
            inputs=[
                io.Model.Input("model", tooltip="The model the picture was inverted with."),
                Inversion.Input("inversion", tooltip="The picture or batch of pictures, from Invert Picture."),
                io.Clip.Input("clip", tooltip="The CLIP that encoded the caption of the inversion."),
                io.String.Input(
                    "caption",
                    multiline=True,
                    tooltip="The text the picture was inverted with, word for word. At most 2000 words.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    multiline=True,
                    tooltip="Words or phrases of the caption, between commas or on lines: a picture for each. Empty: every "
                    "word but little ones like 'a' and 'with'."
                    " At most 100 of them.",
                ),
                start_percent_input(
                    tooltip="Leaves out the steps before this part of the sampling. The first steps are mostly noise: raise "
                    "it if the heat is blurred.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Leaves out the steps after this part of the sampling. Lower it to see what fixes the layout.",
                ),
                io.Combo.Input(
                    "resolution",
                    options=list(RESOLUTIONS),
                    default=RESOLUTIONS[0],
                    advanced=True,
                    tooltip="Which attention layers to look at, by their size as part of the latent's. The coarse ones tell "
                    "things apart best, the fine ones show outlines. all: their mean.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The picture, to lay the heat over. Without it the heat is shown alone.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", is_output_list=True, tooltip="One heatmap per word, as a batch."),
            ],
        )

    @classmethod
    @per_picture(
        pictures="inversion", texts=("caption", "words"), rows=("image",), join=lambda texts, socket: tuple(texts)
    )
    def execute(
        cls, model, inversion, clip, caption, words, start_percent, end_percent, resolution, image=None
    ) -> io.NodeOutput:
        settings = HeatmapSettings(words, (start_percent, end_percent), resolution, image)
        return io.NodeOutput(attention_heatmaps(model, inversion, clip, caption, settings))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroAttentionHeatmap]
