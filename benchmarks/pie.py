"""How good are edits of photographs? `python dev.py bench pie --data FOLDER --checkpoint FILE`

Runs PIE-Bench (Ju et al., ICLR 2024) with a checkpoint, models and data of your own, and prints its table. FOLDER holds
mapping_file.json and annotation_images as its authors hand them out. The edited pictures are kept in --output in the same
layout, so that a run that was stopped goes on, and the authors' own code can judge them too. Nothing is downloaded unless
--allow-download is given.
"""

import argparse
import json
import logging
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from comfy.cli_args import args as host_options

host_options.cpu = not torch.cuda.is_available()  # before anything of ComfyUI that looks for a device

import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
from pix2pix_zero.benchmarks.pie_parts.pie_data import (  # noqa: E402
    CATEGORIES,
    PICTURES,
    PieCase,
    read_cases,
    read_edit,
    write_picture,
)
from pix2pix_zero.benchmarks.pie_parts.pie_figures import PieFigures, pie_figures, table  # noqa: E402
from pix2pix_zero.benchmarks.pie_parts.pie_methods import METHODS, Edit, Editor  # noqa: E402
from pix2pix_zero.demo_model.loader import load_demo_model  # noqa: E402
from pix2pix_zero.host.networks import model_kinds as kinds  # noqa: E402
from pix2pix_zero.host.networks.captioner import load_captioner  # noqa: E402
from pix2pix_zero.host.networks.edit_figures import Judges, mean_figures  # noqa: E402
from pix2pix_zero.host.networks.metric_models import load_clip, load_dino, load_lpips  # noqa: E402

OUTPUT = Path(__file__).resolve().parent.parent / "demo_output" / "pie"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py bench pie", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of the benchmark")
    parser.add_argument(
        "--checkpoint", help="a file, a name in models/checkpoints, or demo; not needed to judge pictures alone"
    )
    parser.add_argument(
        "--methods", nargs="*", choices=METHODS, default=[name for name in METHODS if name != "official"]
    )
    parser.add_argument(
        "--judge",
        nargs="*",
        default=[],
        metavar="NAME=FOLDER",
        help="judge pictures made elsewhere: FOLDER holds them as annotation_images does",
    )
    parser.add_argument("--category", nargs="*", choices=CATEGORIES, default=list(CATEGORIES), help="editing_type_id")
    parser.add_argument("--limit", type=int, default=0, help="only so many edits")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, default=7.5, help="as in the published rows")
    parser.add_argument("--guidance", type=float, default=0.0, help="guidance_strength of default and fast")
    parser.add_argument(
        "--captioner", default="", help="a captioner in models/blip for pix2pix-zero; else the benchmark's own texts"
    )
    parser.add_argument("--clip", default=kinds.NONE, help="a CLIP model in models/pix2pix_zero/metrics")
    parser.add_argument("--dino", default=kinds.NONE, help="a DINO model there; dino-vitb8 for the published figures")
    parser.add_argument("--lpips", default=kinds.NONE, help="an LPIPS .safetensors file there")
    parser.add_argument(
        "--structure-range",
        type=float,
        choices=(255.0, 1.0),
        default=255.0,
        help="255: DINO sees pixels in 0..255 unscaled, as the benchmark's code does. 1: as it was trained, for figures "
        "like the pix2pix-zero paper's",
    )
    parser.add_argument("--allow-download", action="store_true", help="fetch well-known CLIP and DINO models")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--redo", action="store_true", help="draw edits again that are in --output")
    options = parser.parse_args(arguments)
    if options.methods and not options.checkpoint:
        if not options.judge:
            parser.error("--checkpoint: name one, or judge pictures made elsewhere with --judge NAME=FOLDER.")
        options.methods = []
    if any("=" not in each for each in options.judge):
        parser.error("--judge: write NAME=FOLDER.")
    return options


def load_editor(options: argparse.Namespace) -> Editor:
    """The checkpoint's MODEL, CLIP and VAE with the settings of the run. Raises ValueError if there is no such file."""
    if options.checkpoint == "demo":
        model, clip, vae = load_demo_model()
    else:
        path = options.checkpoint
        if not Path(path).is_file():
            path = folder_paths.get_full_path("checkpoints", path)
        if path is None:
            raise ValueError(f"--checkpoint: there is no file {options.checkpoint}, here or in models/checkpoints.")
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)
    captioner = None
    if options.captioner:
        kinds.register_folders()
        captioner = load_captioner(options.captioner, options.allow_download)
    return Editor(model, clip, vae, options.steps, options.cfg, options.guidance, captioner)


def load_judges(options: argparse.Namespace) -> Judges:
    kinds.register_folders()
    return Judges(
        load_clip(options.clip, options.allow_download) if options.clip != kinds.NONE else None,
        load_dino(options.dino, options.allow_download) if options.dino != kinds.NONE else None,
        load_lpips(options.lpips) if options.lpips != kinds.NONE else None,
    )


def draw(case: PieCase, editor: Editor, options: argparse.Namespace) -> dict[str, float]:
    """Make the pictures that are not there yet: seconds by method; an inversion counts for the first that needs it."""
    edit, seconds = None, {}
    for method in options.methods:
        path = options.output / method / PICTURES / case.name
        if options.redo or not path.is_file():
            start = time.perf_counter()
            edit = edit or Edit(editor, case, case.source())
            write_picture(METHODS[method](edit), path)
            seconds[method] = time.perf_counter() - start
    return seconds


def check_settings(options: argparse.Namespace) -> None:
    """Write down what the pictures of each method are drawn with. Raises ValueError if some are there drawn otherwise."""
    names = ("data", "checkpoint", "steps", "cfg", "guidance", "captioner")
    wanted = {name: str(getattr(options, name)) for name in names}
    records = [options.output / method / "drawn_with.json" for method in options.methods]
    for record in records if not options.redo else ():
        before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else wanted
        other = [f"--{name} {before.get(name)}" for name in names if before.get(name) != wanted[name]]
        if other:
            raise ValueError(
                f"--output: {record.parent} holds pictures drawn with {', '.join(other)}. Name another folder, or draw "
                "them again with --redo."
            )
    for record in records:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(wanted, indent=1), encoding="utf-8")


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> dict[str, PieFigures]:
    """Run the benchmark and return the mean figures of each row."""
    options = parse(arguments)
    logging.getLogger().setLevel(logging.WARNING)
    cases = read_cases(options.data, tuple(options.category), options.limit)
    judges = load_judges(options)
    editor = None
    if options.methods:
        editor = load_editor(options)
        check_settings(options)
    folders = {method: options.output / method / PICTURES for method in options.methods}
    folders |= {name: Path(folder) for name, folder in (each.split("=", 1) for each in options.judge)}
    figures: dict[str, dict[str, PieFigures]] = {name: {} for name in folders}
    # All are drawn before any is judged, so that a small GPU need not exchange the checkpoint and the judges for each.
    for number, case in enumerate(cases, 1) if editor else ():
        seconds = draw(case, editor, options)
        print(
            f"{number}/{len(cases)} {case.key}: " + ", ".join(f"{n} {s:.0f} s" for n, s in seconds.items()), flush=True
        )
    for case in cases:
        source, mask = case.source(), case.mask()
        for name, folder in folders.items():
            edited = read_edit(folder / case.name, source)
            figures[name][case.key] = pie_figures(
                source, edited, mask, case.target_text, judges, options.structure_range
            )
    means = {name: mean_figures(list(each.values())) for name, each in figures.items()}
    print(table(means))
    options.output.mkdir(parents=True, exist_ok=True)
    report = options.output / "figures.json"
    pictures = {name: {key: _known(row) for key, row in each.items()} for name, each in figures.items()}
    settings = {name: str(value) for name, value in vars(options).items()}
    report.write_text(json.dumps({"settings": settings, "pictures": pictures}, indent=1), encoding="utf-8")
    print(f"wrote {report}")
    return means


def _known(figures: PieFigures) -> dict[str, float]:
    return {name: value for name, value in asdict(figures).items() if math.isfinite(value)}


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
