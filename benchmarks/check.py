"""Does the pack work with your checkpoint and your picture? `python dev.py bench check --checkpoint FILE --picture FILE`

Captions and inverts the picture, redraws it unedited, then edits it: with the defaults, with guidance, and as in the paper.
Prints a table of what came back, what changed, and what it cost, to be pasted into a bug report. The pictures go to
demo_output/check/. Set COMFYUI_PATH to check the ComfyUI that you use; it is only read. Nothing is downloaded.
"""

import argparse
import logging
import math
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
import torch
from comfy.cli_args import args as host_options

host_options.cpu = not torch.cuda.is_available()  # before anything of ComfyUI that looks for a device

import comfy.model_management  # noqa: E402
import comfyui_version  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from pix2pix_zero.attention_patches.attention import cross_attention_sites  # noqa: E402
from pix2pix_zero.benchmarks.cost_parts.memory import Peak  # noqa: E402
from pix2pix_zero.benchmarks.pie import load_editor, load_judges  # noqa: E402
from pix2pix_zero.benchmarks.pie_parts.pie_data import write_picture  # noqa: E402
from pix2pix_zero.benchmarks.pie_parts.pie_methods import Editor, run_node  # noqa: E402
from pix2pix_zero.host.networks import model_kinds as kinds  # noqa: E402
from pix2pix_zero.host.networks.edit_figures import EditedPicture, EditFigures, Judges, measure_edit  # noqa: E402
from pix2pix_zero.host.sampling.checks import best_side  # noqa: E402
from pix2pix_zero.nodes.directions import Pix2PixZeroApplyDirection, Pix2PixZeroEditDirection  # noqa: E402
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion  # noqa: E402
from pix2pix_zero.nodes.paste import Pix2PixZeroCrop  # noqa: E402
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler  # noqa: E402
from pix2pix_zero.pictures.charts import as_image  # noqa: E402

import nodes as host_nodes  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo_output" / "check"
GUIDED = {"guidance_strength": 0.3}
CFG, DEMO_CFG = 5.0, 1.5
LEGEND = (
    "PSNR outside: how near the redrawn picture is to the source outside the area that may change, both as the autoencoder gives "
    "them; of the whole picture where all of it may. Changed: that area's share of the picture. Structure: how far the layouts "
    "are apart by DINO. CLIP: how well the edit fits the target's words. CLIP accuracy: 1 if better than the source's. Memory: "
    "the peak above what was held before. -: not measured, see --clip and --dino."
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py bench check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a file, a name in models/checkpoints, or demo")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--source", default="cat", help="what it shows (default: %(default)s)")
    parser.add_argument("--target", default="dog", help="what it should show (default: %(default)s)")
    parser.add_argument(
        "--caption", default="", help="one sentence about it; without one, a captioner's, else a photo of a SOURCE"
    )
    parser.add_argument("--captioner", default="", help="a captioner in models/blip")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, help=f"default: {CFG:g}, for the demo {DEMO_CFG:g}")
    parser.add_argument("--size", type=int, default=0, help="the model's best size (default: by its kind)")
    parser.add_argument("--clip", default=kinds.NONE, help="a CLIP model in models/pix2pix_zero/metrics")
    parser.add_argument("--dino", default=kinds.NONE, help="a DINO model there")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    if options.cfg is None:
        options.cfg = DEMO_CFG if options.checkpoint == kinds.DEMO else CFG
    options.allow_download, options.guidance, options.lpips = False, 0.0, kinds.NONE
    return options


@dataclass
class Bench:
    """A picture on its way through the nodes, as a user wires them."""

    editor: Editor
    picture: torch.Tensor
    caption: str
    concepts: tuple[str, str]

    def __post_init__(self):
        self.described = host_nodes.CLIPTextEncode().encode(self.editor.clip, self.caption)[0]

    def invert(self) -> str:
        """The node's report."""
        latent = {"samples": self.editor.vae.encode(self.picture)}
        self.inversion, *_, report = run_node(
            Pix2PixZeroInversion,
            model=self.editor.model,
            positive=self.described,
            latent_image=latent,
            steps=self.editor.steps,
            measure_reconstruction=True,
        )
        (direction,) = run_node(
            Pix2PixZeroEditDirection, clip=self.editor.clip, source=self.concepts[0], target=self.concepts[1]
        )
        (self.moved,) = run_node(Pix2PixZeroApplyDirection, conditioning=self.described, direction=direction)
        return report

    def redraw(self, positive: list, **settings) -> tuple[torch.Tensor, torch.Tensor]:
        """(picture, edited area)."""
        latent, area = run_node(
            Pix2PixZeroKSampler,
            model=self.editor.model,
            inversion=self.inversion,
            positive=positive,
            negative=self.described,
            **{"cfg": self.editor.cfg, **settings},
        )
        return self.editor.vae.decode(latent["samples"]), area


@dataclass(frozen=True)
class Row:
    """What one part gave and cost. `figures`: beside the picture as the autoencoder gives it back, outside the edited area."""

    name: str
    seconds: float
    peak: int
    figures: EditFigures | None = None
    changed: float = math.nan
    """Share of the picture that was allowed to change."""


def measured(name: str, draw: Callable[[], object]) -> tuple[Row, object]:
    """A part's seconds and memory, and what it gave. Says when it begins, since it may take minutes."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    peak = Peak(comfy.model_management.get_torch_device())
    peak.reset()
    start = time.perf_counter()
    result = draw()
    if peak.on_gpu:
        torch.cuda.synchronize()
    return Row(name, time.perf_counter() - start, peak.above_base()), result


def check(bench: Bench, judges: Judges, output: Path) -> tuple[list[Row], str]:
    """(the rows of the table, the inversion's report). Pictures are written on the way."""
    source = bench.editor.vae.decode(bench.editor.vae.encode(bench.picture))
    write_picture(bench.picture, output / "source.png")
    first, report = measured("inversion", bench.invert)
    rows = [first]
    for name, positive, settings in (
        ("unedited", bench.described, {"local_blend": 0.0}),
        ("edit", bench.moved, {}),
        ("edit, guided", bench.moved, GUIDED),
        ("edit, preset fast", bench.moved, {"preset": "fast"}),
        ("edit, preset paper", bench.moved, {"preset": "paper"}),
    ):
        if positive is bench.described:
            logging.disable(logging.WARNING)  # the node's, that nothing is edited
        try:
            row, (picture, area) = measured(name, lambda: bench.redraw(positive, **settings))
        finally:
            logging.disable(logging.NOTSET)
        write_picture(picture, output / f"{re.sub('[^a-z]+', '_', name)}.png")
        mask = None if area.min() == 1 else area
        texts = (f"a photo of a {concept}" for concept in bench.concepts)
        figures = measure_edit(EditedPicture(source, picture, mask, *texts), judges)
        rows.append(Row(name, row.seconds, row.peak, figures, float(area.mean())))
    return rows, report


def table(rows: list[Row]) -> str:
    """In Markdown; - for what was not measured."""

    def written(value: float, form: str) -> str:
        return "-" if math.isnan(value) else form.format(value)

    lines = ["| | PSNR outside | changed | structure | CLIP | CLIP accuracy | seconds | memory |", "|---" * 8 + "|"]
    for row in rows:
        figures = row.figures or EditFigures()
        cells = [
            written(figures.psnr, "{:.1f} dB"),
            written(row.changed, "{:.0%}"),
            written(figures.structure_distance, "{:.4f}"),
            written(figures.clip_similarity, "{:.1f}"),
            written(figures.clip_accuracy, "{:.0f}"),
            f"{row.seconds:.1f}",
            f"{row.peak / 2**30:.2f} GiB",
        ]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(editor: Editor, picture: torch.Tensor, own_size: tuple[int, int]) -> str:
    """What a bug report has to name. `own_size`: width and height of the picture's file."""
    model = editor.model.model
    pack = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    device = comfy.model_management.get_torch_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    height, width = picture.shape[1:3]
    return (
        f"ComfyUI-Pix2PixZero {pack}, ComfyUI {comfyui_version.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}, {device.type} ({name})  \n"
        f"{type(model.model_config).__name__}, {model.model_type.name}, {model.get_dtype_inference()}, "
        f"{len(cross_attention_sites(model.diffusion_model))} cross-attention layers; {width}x{height} "
        f"of a picture of {own_size[0]}x{own_size[1]}, "
        f"{editor.steps} steps, cfg {editor.cfg:g}"
    )


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> list[Row]:
    options = parse(arguments)
    logging.getLogger().setLevel(logging.WARNING)
    comfy.utils.set_progress_bar_enabled(False)
    editor, judges = load_editor(options), load_judges(options)
    size = options.size or best_side(editor.model)
    with Image.open(options.picture) as picture:
        upright = ImageOps.exif_transpose(picture)
        image, own_size = as_image(upright)[None], upright.size
    image, *_ = run_node(Pix2PixZeroCrop, image=image, model_size=size)
    caption = options.caption or (
        editor.captioner.caption(image)[0] if editor.captioner else f"a photo of a {options.source}"
    )
    bench = Bench(editor, image, caption, (options.source, options.target))
    rows, report = check(bench, judges, options.output)
    about = (
        f"{machine(editor, image, own_size)}  \n{options.source} to {options.target}; caption: {caption}  \n{report}"
    )
    text = f"{about}\n\n{table(rows)}\n\n{LEGEND}\n"
    print(f"\n{text}\nFor a bug report copy the above, or {options.output / 'check.md'}. The pictures lie beside it.")
    (options.output / "check.md").write_text(text, encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
