"""Invert a picture to noise (pix2pix-zero section 3.1)."""

import logging

from comfy_api.latest import io

from ..editing.regularization import NoiseRegularization
from ..host import running
from ..host.messages import STEP_DISTILLED
from ..host.running import per_picture
from ..host.sampling.checks import base_of_distilled
from ..host.sampling.invert import (
    MAP_MEMORY,
    METHODS,
    InversionSettings,
    invert_latent,
    inverted_noise,
    reconstruction_report,
)
from .sockets import CATEGORY, Inversion, scheduler_input, seed_input, sigmas_input

DEFAULTS = InversionSettings()


def _show_reports(*outputs: list) -> None:
    """Leave the reports of all pictures on the running node, and in the log."""
    for report in outputs[-1]:
        logging.info("Pix2Pix-Zero: %s", report)
        running.tell(report)


class Pix2PixZeroInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroInversion",
            display_name="Invert Picture (Pix2Pix-Zero)",
            category=CATEGORY,
            description="Walks a picture back to the noise it could have been drawn from, so that it can be redrawn "
            "with a change. Runs once per picture; later edits reuse it.",
            is_input_list=True,
            search_aliases=["ddim inversion", "unsampler", "image to noise", "pix2pix-zero"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that will also draw the edit: SD 1.x, SD 2.x, SDXL, or a flow model such as SD 3.5, "
                    "Flux or Qwen-Image.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The encoded caption of the picture as it is, before the edit. The better it describes "
                    "the picture, the better the picture can be redrawn.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The picture, encoded with the model's VAE. A noise mask on it limits later edits to the "
                    "masked part.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="More steps redraw the picture more faithfully and take longer. 50 is the paper's value, 20 a quick "
                    "look. With ddim_uniform, a number that does not divide 1000 is rounded up: 300 runs 333.",
                ),
                seed_input(
                    tooltip="Draws the shifts of the noise regularization. It changes the result little; keep it fixed "
                    "so that the inversion is reused."
                ),
                io.Float.Input(
                    "autocorrelation_weight",
                    default=20.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="Removes patterns from the noise. Raise it if edits come out with smears or stripes; lower "
                    "it, down to 0, if the redrawn picture differs from the source.",
                ),
                io.Float.Input(
                    "kl_weight",
                    default=20.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="Keeps the brightness and contrast of the noise those of true noise. Raise it if edits "
                    "come out washed out or too contrasty.",
                ),
                io.Int.Input(
                    "regularization_steps",
                    default=5,
                    min=0,
                    max=50,
                    tooltip="How often each predicted noise map is regularized. 0 switches regularization off: the "
                    "most faithful picture, the least editable noise.",
                ),
                io.Int.Input(
                    "autocorrelation_rolls",
                    default=5,
                    min=0,
                    max=50,
                    advanced=True,
                    tooltip="Random shifts compared per regularization step. More shifts catch more patterns for the "
                    "same weight.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    advanced=True,
                    tooltip="direct: also keeps what each step loses, so that the unedited part of the picture comes "
                    "back exactly. ddim: the paper's inversion. official: the authors' code, which skips two steps. "
                    "diffusers: that library's version of it. fixed-point: as direct, but each step is solved so that "
                    "little is lost to begin with; slower, and edits keep more of the picture. aligned: each step of the edit "
                    "is evaluated beside the inversion's own step, so that nothing is lost that would have to be corrected; as "
                    "fast as ddim. For negative-prompt "
                    "inversion, connect this caption to the sampler's negative as well; it goes with every method.",
                ),
                io.Int.Input(
                    "map_memory",
                    default=MAP_MEMORY // 2**20,
                    min=0,
                    max=2**20,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="MB of RAM for the picture's attention maps, so that edits need not compute them again. "
                    "50 steps at 512x512 fill 1700 MB; what does not fit is computed for each edit. Lower it if RAM is "
                    "short; 0 keeps none. Diffusion transformers (SD 3.5, Flux) keep none.",
                ),
                scheduler_input(),
                io.Int.Input(
                    "fixed_point_iterations",
                    default=DEFAULTS.fixed_point_iterations,
                    min=0,
                    max=20,
                    optional=True,
                    advanced=True,
                    tooltip="For the method fixed-point only: how often each step is solved anew. Each time costs as much "
                    "as the whole direct inversion. 0 is as fast as direct and loses less; 1 does for edits; raise it for "
                    "a reconstruction that needs no correction, as stock samplers make it.",
                ),
                io.Boolean.Input(
                    "measure_reconstruction",
                    default=DEFAULTS.measure_reconstruction,
                    optional=True,
                    advanced=True,
                    tooltip="Also redraws the picture plainly, without edit and correction, and reports how close it comes. "
                    "It changes nothing else and takes about as long as inverting.",
                ),
                sigmas_input(),
            ],
            outputs=[
                Inversion.Output(
                    display_name="inversion",
                    is_output_list=True,
                    tooltip="The picture and its way to noise, for the guided sampler and the sister methods.",
                ),
                io.Latent.Output(
                    display_name="noise",
                    is_output_list=True,
                    tooltip="The noise, for stock samplers that add none themselves (DisableNoise). That of a flow model goes "
                    "there only behind Plug-and-Play or Prompt-to-Prompt.",
                ),
                io.Sigmas.Output(
                    display_name="sigmas", is_output_list=True, tooltip="The steps to redraw it in, for stock samplers."
                ),
                io.String.Output(
                    display_name="report",
                    is_output_list=True,
                    tooltip="How well the picture comes back unedited. PSNR in the latent, in dB: above 40 is hard to tell "
                    "from the source, below 30 details are lost.",
                ),
            ],
        )

    @classmethod
    @per_picture(pictures="latent_image", texts=("positive",), finish=_show_reports)
    def execute(
        cls,
        model,
        positive,
        latent_image,
        steps,
        seed,
        autocorrelation_weight,
        kl_weight,
        regularization_steps,
        autocorrelation_rolls,
        method,
        map_memory=MAP_MEMORY // 2**20,
        scheduler=DEFAULTS.scheduler,
        fixed_point_iterations=DEFAULTS.fixed_point_iterations,
        measure_reconstruction=DEFAULTS.measure_reconstruction,
        sigmas=None,
    ) -> io.NodeOutput:
        settings = InversionSettings(
            steps,
            seed,
            NoiseRegularization(autocorrelation_weight, kl_weight, regularization_steps, autocorrelation_rolls),
            method,
            int(map_memory * 2**20 / running.turn_count()),
            scheduler,
            fixed_point_iterations,
            measure_reconstruction,
            sigmas,
        )
        inversion = invert_latent(model, positive, latent_image, settings)
        noise = {"samples": inverted_noise(inversion, model)}
        report = reconstruction_report(inversion)
        if base := base_of_distilled(model):
            report += "\n" + STEP_DISTILLED.format(base=base)
        return io.NodeOutput(inversion, noise, inversion.sigmas.flip(0), report)


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroInversion]
