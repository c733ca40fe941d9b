"""What a distilled edit keeps of its teacher, and what it costs beside it: `python dev.py bench distill`

A student's file for each edit, named as the edit, is applied to the test scenes of `bench quality`, beside the pack's edit
with its defaults, the same of the scene moved sideways and moved back (how much the teacher varies itself), the same in 4
steps, and the source unchanged. Errors are means of 0..255, to the teacher's picture and
to the ground truth, of the whole picture and inside what the edit has to change. Time is the CPU's for one picture on one
thread, from picture to picture. --ablation trains students that differ in one thing each, --full-size counts what an edit by
Stable Diffusion 1.5 costs beside a student. Writes bench_distill.json and a contact sheet for each edit to demo_output/.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import comfy.utils
import torch
from comfy.cli_args import args as host_options

host_options.cpu = True  # before anything of ComfyUI that looks for a device: times are those of one thread

from pix2pix_zero.benchmarks.distill_parts.ablation import Budget, ablate, ablation_table  # noqa: E402
from pix2pix_zero.benchmarks.distill_parts.columns import Column, measure, table  # noqa: E402
from pix2pix_zero.benchmarks.distill_parts.figures import contact_sheet  # noqa: E402
from pix2pix_zero.benchmarks.distill_parts.full_size import report as full_size  # noqa: E402
from pix2pix_zero.benchmarks.judge import load_judge  # noqa: E402
from pix2pix_zero.benchmarks.quality_parts.scenes import EDITS, TEST_SEED, draw_scenes  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo_output"
STUDENTS = ROOT / "demo_model" / "distilled"
SHOWN = 16


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py bench distill", description=__doc__)
    parser.add_argument(
        "--students", type=Path, default=STUDENTS, help="folder of EDIT.safetensors (default: the demo's)"
    )
    parser.add_argument("--edits", nargs="+", choices=EDITS, metavar="NAME", help="default: those that have a student")
    parser.add_argument("--scenes", type=int, help="of each edit (default: 64)")
    parser.add_argument("--steps", type=int, help="of the teacher (default: 50)")
    parser.add_argument("--few-steps", type=int, help="of the fast teacher (default: 4)")
    parser.add_argument(
        "--full-size", choices=("count", "time"), help="also beside SD 1.5; time needs 6 GB and minutes"
    )
    parser.add_argument(
        "--ablation",
        type=Path,
        metavar="WORK",
        help="only that, on pairs that `dev.py train distilled --work WORK` drew",
    )
    parser.add_argument("--ablation-steps", type=int, default=300, help="of each training (default: %(default)s)")
    parser.add_argument("--half", action="store_true", help="train for the ablation in bf16, for CPUs that gain by it")
    parser.add_argument("--quick", action="store_true", help="2 scenes, 4 and 2 steps: to try the benchmark")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write to (default: demo_output)")
    options = parser.parse_args(arguments)
    options.scenes = options.scenes or (2 if options.quick else 64)
    options.steps = options.steps or (4 if options.quick else 50)
    options.few_steps = options.few_steps or (2 if options.quick else 4)
    options.edits = options.edits or [name for name in EDITS if (options.students / f"{name}.safetensors").is_file()]
    if options.ablation:
        return options
    missing = [name for name in options.edits if not (options.students / f"{name}.safetensors").is_file()]
    if missing or not options.edits:
        parser.error(
            f"{options.students} has no student {', '.join(missing) or 'at all'}. Train one with: python dev.py train "
            "distilled --edit NAME, and give its folder with --students."
        )
    return options


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    logging.getLogger().setLevel(logging.WARNING)
    comfy.utils.set_progress_bar_enabled(False)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    judge, results = load_judge(), {}
    if options.ablation:
        for name in options.edits:
            scenes = draw_scenes(EDITS[name], options.scenes, TEST_SEED)
            budget = Budget(options.ablation_steps, options.half)
            found = ablate(EDITS[name], scenes, judge, options.ablation / name, budget, say)
            print(
                f"\n{name}, {options.scenes} test scenes, {options.ablation_steps} steps\n\n{ablation_table(found)}",
                flush=True,
            )
        return
    for name in options.edits:
        edit, file = EDITS[name], options.students / f"{name}.safetensors"
        scenes = draw_scenes(edit, options.scenes, TEST_SEED)
        columns, pictures = measure(edit, scenes, judge, file, (options.steps, options.few_steps), say)
        results[name] = columns
        print(f"\n{name}, {options.scenes} test scenes\n\n{table(columns)}", flush=True)
        rows = [scenes.sources, *pictures.values()]
        contact_sheet([row[:SHOWN] for row in rows]).save(options.output / f"bench_distill_{name}.png")
        write(results, options)
    if options.full_size:
        print(f"\n{full_size(options.full_size == 'time')[1]}")
    print(f"\nRows of the contact sheets: source, {', '.join(pictures)}. Written to {options.output.name}/")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write(results: dict[str, list[Column]], options: argparse.Namespace) -> None:
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "students")}
    found = {name: {column.name: column.figures for column in columns} for name, columns in results.items()}
    report = json.dumps({"settings": settings, "torch": torch.__version__, "results": found}, indent=1)
    (options.output / "bench_distill.json").write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
