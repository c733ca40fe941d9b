"""Step 1 of the workflow: describe the picture in words."""

from comfy_api.latest import io

from ..host.networks.captioner import load_captioner, own_captions
from ..host.networks.model_kinds import BLIP, DEMO, fingerprint, model_names, register_folders
from .sockets import CATEGORY, Captioner

register_folders()


class Pix2PixZeroLoadCaptioner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroLoadCaptioner",
            display_name="Load Captioner (BLIP)",
            category=CATEGORY,
            description="Load a BLIP model that describes pictures in words.",
            search_aliases=["blip", "interrogate", "image to text", "load caption model"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(BLIP),
                    default=DEMO,
                    tooltip="'demo' knows only the embedded demo scenes. For photographs use a BLIP folder in "
                    "models/blip; the large model describes more, the base model is faster. The large one can be "
                    "downloaded.",
                ),
                io.Boolean.Input(
                    "allow_download",
                    default=False,
                    tooltip="Tick to fetch Salesforce/blip-image-captioning-large (1.9 GB), if it is chosen, into models/blip "
                    "if it is not there. Without the tick nothing is ever downloaded."
                    " The first download on a machine asks for a confirmation.",
                ),
            ],
            outputs=[Captioner.Output(display_name="captioner", tooltip="For Caption Image.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, allow_download: bool | None) -> str:
        return fingerprint(BLIP, model_name)

    @classmethod
    def execute(cls, model_name: str, allow_download: bool) -> io.NodeOutput:
        return io.NodeOutput(load_captioner(model_name, allow_download))


class Pix2PixZeroCaption(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroCaption",
            display_name="Caption Image (BLIP)",
            category=CATEGORY,
            description="Describe each picture of a batch in one sentence.",
            search_aliases=["blip", "interrogate", "image to text", "describe"],
            inputs=[
                Captioner.Input(
                    "captioner",
                    tooltip="From Load Captioner. It is not loaded where you write the caption yourself.",
                    lazy=True,
                ),
                io.Image.Input(
                    "image",
                    tooltip="The picture to describe: the one you will edit. Each picture of a batch gets its own "
                    "caption.",
                ),
                io.String.Input(
                    "prefix",
                    default="",
                    tooltip="Words every caption starts with, such as 'a photo of'. They steer the rest. Leave empty "
                    "if in doubt."
                    " At most 2000 letters.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=40,
                    min=1,
                    max=200,
                    advanced=True,
                    tooltip="The longest caption, in word pieces. Raise it if captions are cut off; lower it if they "
                    "ramble or repeat.",
                ),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Your own caption: one sentence that says what the picture shows, such as 'a photo of a cat on a "
                    "sofa', or a line for each picture of a batch. No captioner is needed then. Leave it empty to have the "
                    "picture described."
                    " At most 1000000 letters.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="caption", is_output_list=True, tooltip="One caption per picture, as a list."
                )
            ],
        )

    @classmethod
    def check_lazy_status(
        cls, captioner=None, image=None, prefix: str = "", max_new_tokens: int = 40, caption: str = ""
    ) -> list[str]:
        return [] if caption.strip() or captioner is not None else ["captioner"]

    @classmethod
    def execute(
        cls, image, captioner=None, prefix: str = "", max_new_tokens: int = 40, caption: str = ""
    ) -> io.NodeOutput:
        if caption.strip():
            return io.NodeOutput(own_captions(caption, len(image)))
        return io.NodeOutput(captioner.caption(image, prefix, max_new_tokens))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroLoadCaptioner, Pix2PixZeroCaption]
