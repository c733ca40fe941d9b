"""Measure an edit: what it kept of the picture and whether it was made."""

from dataclasses import astuple, fields

from comfy_api.latest import io

from ..host.networks import model_kinds as kinds
from ..host.networks.edit_figures import EditFigures, Judges, mean_figures, measure_edits, pair_pictures
from ..host.networks.edit_report import write_report
from ..host.networks.metric_models import load_clip, load_dino, load_lpips
from .sockets import CATEGORY, first

kinds.register_folders()

MEANINGS = {
    "psnr": "Likeness to the source in dB, outside the mask if there is one. Above 30 differences are hard to see.",
    "ssim": "Likeness of local structure, 1 is the same; outside the mask if there is one.",
    "mse": "Mean squared difference on pixels in 0..1; outside the mask if there is one.",
    "mse_inside": "The same inside the mask: how much the edit changed there.",
    "lpips": "Perceptual distance, 0 is the same; outside the mask if there is one.",
    "structure_distance": "How far shapes and layout moved, 0 is not at all (DINO self-similarity).",
    "clip_similarity": "How well the edited picture fits the target text, 0 to 100. 25 is usual for a good fit.",
    "clip_similarity_inside": "The same for the part inside the mask, on black.",
    "clip_accuracy": "Part of the pictures that fit the target text better than the source text.",
}


class Pix2PixZeroEditMetrics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroEditMetrics",
            display_name="Edit Metrics",
            category=CATEGORY,
            description="Measures what an edit kept of the picture, and with models of your own whether it was made. A "
            "figure that was not measured is NaN, and the report says why.",
            is_input_list=True,
            search_aliases=["psnr", "ssim", "lpips", "clip score", "structure distance", "compare images", "pie-bench"],
            inputs=[
                io.Image.Input("source", tooltip="The picture before the edit: one for all edits, or one for each."),
                io.Image.Input("edited", tooltip="The edited picture, of the same size."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What was meant to change: white. PSNR, SSIM, MSE and LPIPS then look only at the rest. Take "
                    "a mask drawn by hand to compare methods; a method's own mask flatters it.",
                ),
                io.String.Input(
                    "source_text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What the source shows, such as 'a photo of a cat'. One line for all pictures, or one each. "
                    "Needed for CLIP accuracy only."
                    " At most 1000000 letters.",
                ),
                io.String.Input(
                    "target_text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What the edited picture should show. Change only the edited words of the source text, else "
                    "CLIP accuracy measures the rest of the wording too."
                    " At most 1000000 letters.",
                ),
                _model_input(
                    kinds.CLIP,
                    "Tells how well the picture fits the text. Benchmarks take clip-vit-large-patch14; the base model "
                    "is four times smaller.",
                ),
                _model_input(
                    kinds.DINO,
                    "Tells how far shapes and layout moved. Papers take dino-vitb8; the small vits8 is faster, but its "
                    "figures do not compare with theirs.",
                ),
                io.Combo.Input(
                    "lpips_model",
                    options=kinds.lpips_names(),
                    default=kinds.NONE,
                    optional=True,
                    tooltip="LPIPS on SqueezeNet, a .safetensors file in models/pix2pix_zero/metrics. Make it once from "
                    "the lpips package: the state_dict() of lpips.LPIPS(net='squeeze').",
                ),
                io.Boolean.Input(
                    "allow_download",
                    default=False,
                    optional=True,
                    tooltip="Tick to fetch the chosen CLIP model (0.6 or 1.7 GB) into "
                    "models/pix2pix_zero/metrics if it is not there. Without the tick nothing is ever downloaded."
                    " The first download on a machine asks for a confirmation.",
                ),
                io.String.Input(
                    "labels",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What the pictures are called in the report, such as the methods that drew them: a line for "
                    "each. Left empty, they are numbered.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The means, every picture, and what was not measured."),
                *(
                    io.Float.Output(display_name=field.name, tooltip=f"{MEANINGS[field.name]} Mean over the pictures.")
                    for field in fields(EditFigures)
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_model=None, dino_model=None, lpips_model=None, **inputs) -> str:
        clip, dino, lpips = (chosen[0] if chosen else kinds.NONE for chosen in (clip_model, dino_model, lpips_model))
        return repr(
            [kinds.fingerprint(kinds.CLIP, clip), kinds.fingerprint(kinds.DINO, dino), kinds.lpips_fingerprint(lpips)]
        )

    @classmethod
    def execute(
        cls,
        source,
        edited,
        mask=(),
        source_text=("",),
        target_text=("",),
        clip_model=(kinds.NONE,),
        dino_model=(kinds.NONE,),
        lpips_model=(kinds.NONE,),
        allow_download=(False,),
        labels=("",),
    ) -> io.NodeOutput:
        pictures = pair_pictures(source, edited, mask, source_text, target_text)
        download = first(allow_download, "allow_download")
        clip, dino = first(clip_model, "clip_model"), first(dino_model, "dino_model")
        lpips = first(lpips_model, "lpips_model")
        judges = Judges(
            load_clip(clip, download) if clip != kinds.NONE else None,
            load_dino(dino, download) if dino != kinds.NONE else None,
            load_lpips(lpips) if lpips != kinds.NONE else None,
        )
        figures = measure_edits(pictures, judges)
        return io.NodeOutput(write_report(figures, pictures, judges, labels), *astuple(mean_figures(figures)))


def _model_input(kind: kinds.ModelKind, advice: str) -> io.Combo.Input:
    if kind is kinds.DINO:
        of_slash = "a name with a slash stands for a folder of its last part, which is not downloaded."
    else:
        of_slash = "a name with a slash is one that can be downloaded."
    return io.Combo.Input(
        kind.socket,
        options=kinds.model_names(kind),
        default=kinds.NONE,
        optional=True,
        tooltip=f"{advice} A folder in models/pix2pix_zero/metrics with config.json and model.safetensors; {of_slash}",
    )


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroEditMetrics]
