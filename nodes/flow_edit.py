"""Edit a picture without inverting it (FlowEdit, Kulikov et al., ICCV 2025)."""

from comfy_api.latest import io

from ..editing.flow_edit import FlowEditSettings
from ..host.running import per_picture
from ..host.sampling.checks import SCHEDULERS
from ..host.sampling.flow_edit import PRESETS, FlowEditing, flow_edit_latent
from .sockets import CATEGORY, edited_area_output, edited_latent_output, seed_input, sigmas_input

DEFAULTS = FlowEditing()


class Pix2PixZeroFlowEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroFlowEdit",
            display_name="FlowEdit (Pix2Pix-Zero)",
            category=CATEGORY,
            description="Edits a picture without inverting it: it is moved along the difference between what the model "
            "draws for two texts. Works with models that diffuse and with flow models.",
            is_input_list=True,
            search_aliases=["flowedit", "flowalign", "inversion-free edit", "pix2pix-zero"],
            inputs=[
                io.Model.Input("model", tooltip="Any model that draws pictures, of the diffusion or the flow kind."),
                io.Conditioning.Input("source", tooltip="The encoded caption of the picture."),
                io.Conditioning.Input(
                    "target",
                    tooltip="The edited text: the caption moved by Apply Direction, or another encoded caption.",
                ),
                io.Latent.Input("latent_image", tooltip="The picture, encoded with the model's VAE."),
                io.Int.Input(
                    "steps",
                    default=DEFAULTS.steps,
                    min=1,
                    max=1000,
                    tooltip="Steps of the whole way from noise, of which skip leaves some out. Raise it for finer detail. With "
                    "ddim_uniform, a number that does not divide 1000 is rounded up: 300 runs 333.",
                ),
                io.Float.Input(
                    "cfg",
                    default=DEFAULTS.cfg,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the edit is drawn. Raise it if the edit does not show, lower it if colours burn "
                    "or the background changes.",
                ),
                io.Float.Input(
                    "skip",
                    default=DEFAULTS.skip,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps, from pure noise on, that are left out. Raise it if the layout or pose "
                    "changes, lower it, down to 0, if the new subject keeps the old one's shape.",
                ),
                seed_input(
                    tooltip="The noise that is added on the way. Change it for another edit of the same picture."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULERS),
                    default=DEFAULTS.scheduler,
                    optional=True,
                    advanced=True,
                    tooltip="Which noise levels the steps lie on: those that suit the model in a KSampler suit it here.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative of both texts, such as an empty one. Without it the source's text is the "
                    "negative, which keeps most of the picture.",
                ),
                io.Float.Input(
                    "source_cfg",
                    default=DEFAULTS.source_cfg,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="cfg of the source's text, with a negative only: the authors take 1.5 with Flux and 3.5 with "
                    "SD 3, beside a cfg of 5.5 and 13.5.",
                ),
                io.Int.Input(
                    "samples",
                    default=DEFAULTS.averaging.samples,
                    min=1,
                    max=16,
                    optional=True,
                    advanced=True,
                    tooltip="Noises that are averaged in each step. Raise it if the edit is grainy or its edges doubled; "
                    "time grows in proportion.",
                ),
                io.Float.Input(
                    "source_consistency",
                    default=DEFAULTS.averaging.consistency,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    optional=True,
                    advanced=True,
                    tooltip="Pulls each step back to the source (FlowAlign; 0.01 is its authors' value). Raise it if the "
                    "picture drifts, lower it if the edit is faint.",
                ),
                io.Float.Input(
                    "local_blend",
                    default=DEFAULTS.local_blend,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Keeps the source picture wherever the edit acts less than this part of its strongest. Raise "
                    "it if the background still changes, lower it if the edit is cut off. 0 lets the whole picture change.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Where the picture may change at all: white."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=DEFAULTS.preset,
                    optional=True,
                    tooltip="default: as set. whole picture: for another light, season or style, from pure noise on: skip, "
                    "local_blend and source_consistency then do nothing. Choose it if such an edit comes out faint or spotted.",
                ),
                sigmas_input(),
            ],
            outputs=[edited_latent_output(), edited_area_output()],
        )

    @classmethod
    @per_picture(pictures="latent_image", texts=("source", "target", "negative"), rows=("mask",))
    def execute(
        cls,
        model,
        source,
        target,
        latent_image,
        steps,
        cfg,
        skip,
        seed,
        scheduler=DEFAULTS.scheduler,
        negative=None,
        source_cfg=DEFAULTS.source_cfg,
        samples=DEFAULTS.averaging.samples,
        source_consistency=DEFAULTS.averaging.consistency,
        local_blend=DEFAULTS.local_blend,
        mask=None,
        preset=DEFAULTS.preset,
        sigmas=None,
    ) -> io.NodeOutput:
        averaging = FlowEditSettings(samples, source_consistency)
        settings = FlowEditing(
            steps, scheduler, skip, source_cfg, cfg, seed, local_blend, mask, sigmas, averaging, preset
        )
        edited, edited_area = flow_edit_latent(model, source, target, negative, latent_image, settings)
        return io.NodeOutput({"samples": edited}, edited_area)


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroFlowEdit]
