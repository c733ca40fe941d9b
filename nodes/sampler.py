"""Redraw an inverted picture along an edit (pix2pix-zero section 3.3, Algorithm 1)."""

from comfy_api.latest import io

from ..host.running import per_picture
from ..host.sampling.edit import FEATURE_UNTIL, PRESETS, EditSettings, sample_edit
from .sockets import CATEGORY, Inversion, edited_area_output, edited_latent_output, start_percent_input

CFG = EditSettings.cfg
LOCAL_BLEND = 0.2


class Pix2PixZeroKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroKSampler",
            display_name="KSampler (Pix2Pix-Zero)",
            category=CATEGORY,
            description="Redraws an inverted picture with the edited text while the picture's own shapes, and "
            "cross-attention guidance if wanted, keep its layout, pose and background.",
            is_input_list=True,
            search_aliases=["cross-attention guidance", "guided ksampler", "edit sampler", "pix2pix-zero"],
            inputs=[
                io.Model.Input("model", tooltip="The model the picture was inverted with. LoRAs may be added to it."),
                Inversion.Input("inversion", tooltip="The picture, from Invert Picture or Generate Reference."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The caption moved along the edit, from Apply Direction. Words may follow it, by Conditioning "
                    "(Concat) too: they are drawn, and the rest is held in place.",
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip="For an inverted picture the unedited caption: what is not edited then stays as it is. "
                    "For a generated picture the negative it was generated with.",
                ),
                io.Float.Input(
                    "cfg",
                    default=CFG,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the edit is drawn. Raise it, to 7.5, if the edit does not show or traces of the old "
                    "shape are left; lower it if colours burn or the background changes. 5 suits Stable Diffusion "
                    "checkpoints, 1.5 the demo model.",
                ),
                io.Float.Input(
                    "guidance_strength",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    tooltip="How much of what the edit has moved in the attention maps is taken back: 0 none, 1 all that a "
                    "gradient step can. Raise it, to 0.05 or 0.2, if pose or layout drift although feature_until is high; "
                    "lower it if the new thing does not get its own shape. 0 needs no gradients and is the fastest. Edits that "
                    "change the whole picture are guided only with local_blend 0. Of diffusion transformers it is measured "
                    "on the demo's only, where 0.05 to 0.1 is best.",
                ),
                start_percent_input(
                    tooltip="When guidance starts, as part of the sampling. The first steps fix the layout, so keep 0 "
                    "unless the edit must change the outline.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="When guidance stops, as part of the sampling. Lower it, to 0.5, to save time or to let fine "
                    "detail follow the edit freely.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="default",
                    advanced=True,
                    tooltip="default: evaluates both texts at every step, and guides at every step where guidance_strength is "
                    "above 0. fast: evaluates the negative text at every other step, and guides at about 16 steps, one "
                    "in three of 50, which gives nearly the same edit; try it first. low memory: the edit of default in "
                    "much less memory and more time; set map_memory of Invert Picture to 0 as well. paper: guidance "
                    "alone, in all steps, by the paper's gradient step (lambda 0.1), without guidance_strength, "
                    "local_blend and feature_until. official: the same by the authors' update, step for step, to "
                    "compare with their results; it is the slowest.",
                ),
                io.Float.Input(
                    "local_blend",
                    default=LOCAL_BLEND,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Keeps the source picture wherever the edit acts less than this part of its strongest. Raise "
                    "it if the background still changes, lower it if the edit is cut off or stops at an edge. 0 lets "
                    "the whole picture change.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the picture may change at all: white. It is not needed, local_blend finds the place "
                    "by itself.",
                ),
                io.Float.Input(
                    "feature_until",
                    default=FEATURE_UNTIL,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="How long the picture's own shapes are put in, as part of the steps. Raise it if the shape or "
                    "layout drifts, to 0.8 for edits that change only colours and light; lower it, down to 0, if the new "
                    "subject keeps the old one's shape.",
                ),
            ],
            outputs=[edited_latent_output(), edited_area_output()],
        )

    @classmethod
    @per_picture(pictures="inversion", texts=("positive", "negative"), rows=("mask",))
    def execute(
        cls,
        model,
        inversion,
        positive,
        negative,
        cfg,
        guidance_strength,
        start_percent,
        end_percent,
        preset,
        local_blend=LOCAL_BLEND,
        mask=None,
        feature_until=FEATURE_UNTIL,
    ) -> io.NodeOutput:
        settings = EditSettings(
            cfg, guidance_strength, (start_percent, end_percent), preset, local_blend, feature_until, mask
        )
        samples, edited_area = sample_edit(model, inversion, positive, negative, settings)
        return io.NodeOutput({"samples": samples}, edited_area)


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroKSampler]
