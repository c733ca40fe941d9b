"""Generate a picture and keep the way to it: the synthetic-image case of pix2pix-zero."""

from comfy_api.latest import io

from ..host.sampling.checks import AUTO
from ..host.sampling.reference import ReferenceSettings, generate_reference
from .sampler import CFG
from .sockets import CATEGORY, Inversion, scheduler_input, seed_input, sigmas_input


class Pix2PixZeroReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroReference",
            display_name="Generate Reference (Pix2Pix-Zero)",
            category=CATEGORY,
            description="Draws a picture from a prompt and keeps its trajectory, so that it can be edited without "
            "inverting it: nothing of the picture is lost.",
            search_aliases=["edit generated image", "synthetic image", "pix2pix-zero"],
            inputs=[
                io.Model.Input("model", tooltip="The model that draws the picture and later its edit."),
                io.Conditioning.Input("positive", tooltip="The encoded prompt of the picture before the edit."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What the picture should not show; an empty prompt is fine. Use the same one on the "
                    "guided sampler.",
                ),
                io.Latent.Input("latent_image", tooltip="An empty latent: its size and batch are the pictures'."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Sampling steps; the edit takes the same ones. 50 is the paper's value, 20 a quick look. With "
                    "ddim_uniform, a number that does not divide 1000 is rounded up: 300 runs 333.",
                ),
                io.Float.Input(
                    "cfg",
                    default=CFG,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strictly the picture follows the prompt. Use the same value on the guided sampler, or "
                    "the background of the edit drifts.",
                ),
                seed_input(tooltip="The noise the picture is drawn from. Change it for another picture."),
                scheduler_input(),
                sigmas_input(),
            ],
            outputs=[
                Inversion.Output(display_name="inversion", tooltip="The picture and the way to it, for edits."),
                io.Latent.Output(display_name="latent", tooltip="The picture before the edit."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, steps, cfg, seed, scheduler=AUTO, sigmas=None
    ) -> io.NodeOutput:
        settings = ReferenceSettings(steps, cfg, seed, scheduler, sigmas)
        inversion, samples = generate_reference(model, positive, negative, latent_image, settings)
        return io.NodeOutput(inversion, {"samples": samples})


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroReference]
