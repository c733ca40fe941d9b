"""Show what the decoder sees in inverted pictures (Plug-and-Play, Tumanyan et al., CVPR 2023, figures 3 and 4)."""

from comfy_api.latest import io

from ..host.views.feature_pictures import KINDS, feature_pictures
from .sockets import CATEGORY, Inversion


class Pix2PixZeroFeaturePCA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroFeaturePCA",
            display_name="Feature PCA (Pix2Pix-Zero)",
            category=CATEGORY,
            description="Shows the features that Plug-and-Play takes over from an inverted picture: parts of one "
            "colour are one thing to the model. A batch of pictures shares its colours.",
            search_aliases=["features", "pca", "principal components", "plug-and-play", "visualize unet"],
            inputs=[
                io.Model.Input("model", tooltip="The model the picture was inverted with."),
                Inversion.Input("inversion", tooltip="The picture or batch of pictures, from Invert Picture."),
                io.Combo.Input(
                    "features",
                    options=list(KINDS),
                    default=KINDS[0],
                    tooltip="residual features: what a convolution block adds, the layout. queries, keys, values: of "
                    "the block's self-attention, which tell what belongs together.",
                ),
                io.Float.Input(
                    "percent",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When to look, as part of the sampling: 0 is noise, 1 the finished picture. Choose a later "
                    "moment if the colours are blurred.",
                ),
                io.Int.Input(
                    "decoder_block",
                    default=-1,
                    min=-1,
                    max=63,
                    advanced=True,
                    tooltip="Where to look, counted from 0, the coarsest. -1 is the block that Plug-and-Play uses. "
                    "Later blocks show finer parts and more of the appearance.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The features as colours, one picture each.")],
        )

    @classmethod
    def execute(cls, model, inversion, features, percent, decoder_block=-1) -> io.NodeOutput:
        return io.NodeOutput(feature_pictures(model, inversion, features, percent, decoder_block))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroFeaturePCA]
