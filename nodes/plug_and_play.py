"""Draw another picture with the layout of an inverted one (Plug-and-Play, Tumanyan et al., CVPR 2023)."""

from comfy_api.latest import io

from ..host.methods.plug_and_play import with_source_features
from .sockets import CATEGORY, Inversion


class Pix2PixZeroPlugAndPlay(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroPlugAndPlay",
            display_name="Plug-and-Play (Pix2Pix-Zero)",
            category=CATEGORY,
            description="Makes a model keep the layout of an inverted picture while it draws any text: features and "
            "self-attention of the picture are put in place of its own. Sample the model with SamplerCustomAdvanced, "
            "DisableNoise, and the inversion's noise and sigmas; one more UNet call per step reads the picture.",
            search_aliases=["pnp", "plug-and-play", "feature injection", "self-attention injection", "structure"],
            inputs=[
                io.Model.Input("model", tooltip="The model the picture was inverted with. LoRAs may be added to it."),
                Inversion.Input("inversion", tooltip="The picture, from Invert Picture or Generate Reference."),
                io.Float.Input(
                    "feature_until",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How long the picture's features are put in, as part of its steps. They hold layout and "
                    "shapes. Raise it if the layout drifts, lower it if the new subject keeps the old one's shape.",
                ),
                io.Float.Input(
                    "attention_until",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How long the picture's self-attention is put in, as part of its steps. It holds edges and "
                    "fine structure. Raise it if details or the background change, lower it if the edit does not show.",
                ),
                io.Float.Input(
                    "negative_alpha",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="1: cfg leads away from the sampler's negative alone. Lower: also from the picture's own "
                    "caption, 0 from that alone. Lower it if too much of the source's look stays, as with drawings and "
                    "silhouettes (0.75), or if an empty negative lets the background drift. Below 1 it costs one more "
                    "UNet call per step.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For the stock samplers, with any text.")],
        )

    @classmethod
    def execute(cls, model, inversion, feature_until, attention_until, negative_alpha=1.0) -> io.NodeOutput:
        return io.NodeOutput(with_source_features(model, inversion, feature_until, attention_until, negative_alpha))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroPlugAndPlay]
