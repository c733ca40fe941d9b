"""Edit a part of a large picture at the model's size, and keep all other pixels as they were."""

from comfy_api.latest import io

from ..pictures.paste import FEATHER, GROW, KEEP_BELOW, MATCH_COLOURS, Seam, paste_edit
from ..pictures.regions import SHAPES, crop_to_edit
from .sockets import CATEGORY, Box

MODEL_SIZE = 512
CONTEXT = 1.5


class Pix2PixZeroCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroCrop",
            display_name="Crop to Edit",
            category=CATEGORY,
            description="Takes a picture of any size, or the part of it around a mask, to the size that the model draws best. "
            "Paste Edit puts the edit back.",
            search_aliases=["crop and stitch", "inpaint crop", "resize for vae", "detailer", "fit to model"],
            inputs=[
                io.Image.Input("image", tooltip="The picture, at its own size."),
                io.Int.Input(
                    "model_size",
                    default=MODEL_SIZE,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="The model's best size: 512 for SD 1.5, 768 for SD 2.x, 1024 for SDXL, 128 for the demo model. "
                    "The result has as many pixels as a square of this side.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White on what is to be edited, as the mask editor of Load Image draws it. Use it for a small "
                    "subject in a large picture. Without it, the whole picture is taken.",
                ),
                io.Float.Input(
                    "context",
                    default=CONTEXT,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    tooltip="How much around the mask is taken along, as a multiple of its width and height. Raise it if "
                    "the caption or the edit misses what stands around; lower it to draw the subject larger and finer.",
                ),
                io.Combo.Input(
                    "shape",
                    options=list(SHAPES),
                    default=SHAPES[0],
                    optional=True,
                    tooltip="as it is: the proportions of the mask or the picture, up to 2:1. square: for models that draw "
                    "squares best, such as SD 1.5 and the demo model; without a mask it takes the middle.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="What to edit, with sides that VAE Encode keeps whole."),
                io.Mask.Output(display_name="mask", tooltip="The mask in that picture; white all over without one."),
                Box.Output(display_name="crop_region", tooltip="Where it lies in the picture, for Paste Edit."),
            ],
        )

    @classmethod
    def execute(cls, image, model_size, mask=None, context=CONTEXT, shape=SHAPES[0]) -> io.NodeOutput:
        picture, inner, region = crop_to_edit(image, model_size, mask, context, shape)
        return io.NodeOutput(picture, inner, region.as_box())


class Pix2PixZeroPasteEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroPasteEdit",
            display_name="Paste Edit",
            category=CATEGORY,
            description="Puts an edit back into the picture it was made of, at that picture's own size. Outside the edited "
            "area, every pixel stays exactly as it was.",
            search_aliases=["stitch", "uncrop", "composite", "keep background", "restore details", "full resolution"],
            inputs=[
                io.Image.Input("source", tooltip="The picture before the edit, at its own size."),
                io.Image.Input("edited", tooltip="The edited picture, from VAE Decode. It may be smaller, or a part."),
                io.Mask.Input(
                    "edited_area",
                    optional=True,
                    tooltip="Where the picture was edited: edited_area of the sampler, or a mask of your own, as large as the "
                    "edited picture or as the source. Left open, it is where the two pictures differ, see keep_below.",
                ),
                Box.Input(
                    "crop_region",
                    optional=True,
                    extra_dict={"forceInput": True},  # newer frontends would show four numbers in the place of a socket
                    tooltip="Which part of the source was edited: crop_region of Crop to Edit, or the box of Image Crop. "
                    "Without it, the edited picture is taken for the whole source, or for its middle if its proportions "
                    "differ.",
                ),
                io.Int.Input(
                    "grow",
                    default=GROW,
                    min=0,
                    max=256,
                    optional=True,
                    tooltip="By how many pixels of the edited picture the area is larger. Raise it if the edit is cut off "
                    "at its edge, lower it if too much around it has changed.",
                ),
                io.Int.Input(
                    "feather",
                    default=FEATHER,
                    min=0,
                    max=256,
                    optional=True,
                    tooltip="Over how many pixels more the edit fades into the source. Raise it if the edge shows, lower "
                    "it if outlines look double. 0 is a hard edge.",
                ),
                io.Float.Input(
                    "match_colours",
                    default=MATCH_COLOURS,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    optional=True,
                    tooltip="How far the edit's colours are moved to those of the source along the edge. Raise it if the "
                    "edited part is lighter, darker or tinted; lower it if colours of the surroundings bleed into it.",
                ),
                io.Float.Input(
                    "keep_below",
                    default=KEEP_BELOW,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    optional=True,
                    tooltip="Within the area too, the source stays wherever the edit differs from it by less than this part "
                    "of its strongest difference. Raise it if more than the edit is replaced, lower it if parts of the edit "
                    "are missing. 0 takes all of the area.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The source with the edit in it.")],
        )

    @classmethod
    def execute(
        cls,
        source,
        edited,
        edited_area=None,
        crop_region=None,
        grow=GROW,
        feather=FEATHER,
        match_colours=MATCH_COLOURS,
        keep_below=KEEP_BELOW,
    ) -> io.NodeOutput:
        seam = Seam(grow, feather, match_colours, keep_below)
        return io.NodeOutput(paste_edit(source, edited, edited_area, crop_region, seam))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroCrop, Pix2PixZeroPasteEdit]
