"""Edit an inverted picture by changing its caption (Prompt-to-Prompt, Hertz et al., ICLR 2023)."""

from comfy_api.latest import io

from ..host.methods.prompt_to_prompt import PromptEditSettings, edit_by_prompt
from .sockets import CATEGORY, Inversion


class Pix2PixZeroPromptToPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroPromptToPrompt",
            display_name="Prompt-to-Prompt (Pix2Pix-Zero)",
            category=CATEGORY,
            description="Redraws an inverted picture with another caption: words that stay keep their place in the "
            "picture, words that change are drawn where the old ones were. Sample the model with a stock sampler "
            "(euler, no added noise) from the noise and sigmas of Invert Picture, with the source caption as the negative.",
            search_aliases=["p2p", "prompt to prompt", "attention replace", "word swap", "local blend"],
            inputs=[
                io.Model.Input("model", tooltip="The model the picture was inverted with. LoRAs may be added to it."),
                Inversion.Input("inversion", tooltip="The picture, from Invert Picture or Generate Reference."),
                io.Clip.Input("clip", tooltip="The CLIP that encoded the caption of the inversion."),
                io.String.Input(
                    "source",
                    multiline=True,
                    tooltip="The caption of the picture as it is: the text it was inverted with, word for word."
                    " At most 2000 words.",
                ),
                io.String.Input(
                    "target",
                    multiline=True,
                    tooltip="The caption after the edit. Change as few words as possible: the others hold the picture "
                    "together. A swapped word is drawn in the place of the old one, an added word finds its own place."
                    " At most 2000 words.",
                ),
                io.Float.Input(
                    "cross_until",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Part of the sampling in which each word attends to the same places as in the source. Raise "
                    "it if the layout drifts, lower it if the new thing has the wrong shape.",
                ),
                io.Float.Input(
                    "self_until",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Part of the sampling in which the picture keeps the outlines of the source. Raise it if "
                    "pose or background change, lower it if the edit does not show.",
                ),
                io.String.Input(
                    "reweight",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="Words of the target to show more or less, as 'fluffy: 2', one per line or between commas. "
                    "0 fades a word out, 2 to 4 brings it out, below 0 turns it into its opposite. It works on an "
                    "unchanged caption too.",
                ),
                io.Float.Input(
                    "local_blend",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Keeps everything as it was except where the changed words are drawn; 0.3 is a good start. "
                    "Raise it if too much changes, lower it if the new thing is cut off. 0 switches it off, which "
                    "edits of the whole picture (day to night, a style) need.",
                ),
                io.String.Input(
                    "blend_words",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="The words, of source or target, that local_blend draws its mask from, between commas. "
                    "Empty: the words that differ.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the stock samplers."),
                io.Conditioning.Output(
                    display_name="positive", tooltip="The target caption, encoded: the sampler's positive."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        inversion,
        clip,
        source,
        target,
        cross_until,
        self_until,
        reweight="",
        local_blend=0.0,
        blend_words="",
    ) -> io.NodeOutput:
        settings = PromptEditSettings(cross_until, self_until, reweight, local_blend, blend_words)
        return io.NodeOutput(*edit_by_prompt(model, inversion, clip, source, target, settings))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroPromptToPrompt]
