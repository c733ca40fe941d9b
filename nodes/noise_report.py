"""Compare inverted noise with true noise (pix2pix-zero section 3.1)."""

from comfy_api.latest import io

from ..pictures.noise_report import report_noise
from .sockets import CATEGORY, Inversion


class Pix2PixZeroNoiseReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroNoiseReport",
            display_name="Noise Report (Pix2Pix-Zero)",
            category=CATEGORY,
            description="Shows how close inverted noise is to the true noise that a model was trained on: values, "
            "frequencies, patterns and channels. What lies outside the grey bands is not chance.",
            search_aliases=["noise statistics", "autocorrelation", "histogram", "power spectrum", "analyze latent"],
            inputs=[
                io.Latent.Input(
                    "noise", tooltip="The noise output of Invert Picture. A batch gives a picture for each."
                ),
                Inversion.Input(
                    "inversion",
                    optional=True,
                    tooltip="The inversion that the noise belongs to; it tells the noise's scale. Without it the noise is "
                    "first divided by its own standard deviation, so that too strong or too weak noise does not show.",
                ),
                io.Latent.Input(
                    "compare_with",
                    optional=True,
                    tooltip="Another noise, drawn beside it: of an inversion with regularization_steps 0, or of another "
                    "method, with the same number of steps.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The plots, one picture per noise of the batch."),
                io.String.Output(display_name="report", tooltip="The figures as text."),
            ],
        )

    @classmethod
    def execute(cls, noise, inversion=None, compare_with=None) -> io.NodeOutput:
        return io.NodeOutput(*report_noise(noise, inversion, compare_with))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroNoiseReport]
