"""How good are edits beside other methods on the same weights, against ground truth? `python dev.py bench quality`

Every method has one knob. It is set on tuning scenes: of the values that make the edit in 95 % of those in whose true
picture the judge sees it, the one with the lowest error to the true picture. Then the method is measured on test scenes.
Edits of the whole picture (day to night, a style) leave no background, so background figures are left out there. A second
table is of the edits pasted back into their sources, by Paste Edit. Writes tables, bench_quality.json, the trade-off curves
bench_quality.png and a contact sheet for each edit to demo_output/.
"""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import comfy.utils
import torch
from comfy.cli_args import args as host_options

host_options.cpu = not torch.cuda.is_available()  # before anything of ComfyUI that looks for a device

from pix2pix_zero.benchmarks.judge import load_judge  # noqa: E402
from pix2pix_zero.benchmarks.quality_parts.drawing import contact_sheet, trade_off  # noqa: E402
from pix2pix_zero.benchmarks.quality_parts.methods import DIFFUSING, METHODS, NEEDING_A_UNET, SETTINGS  # noqa: E402
from pix2pix_zero.benchmarks.quality_parts.report import pasted_table, table  # noqa: E402
from pix2pix_zero.benchmarks.quality_parts.scenes import EDITS, TEST_SEED, TUNING_SEED, draw_scenes  # noqa: E402
from pix2pix_zero.benchmarks.quality_parts.tuning import compare, unedited  # noqa: E402
from pix2pix_zero.benchmarks.quality_parts.workbench import DemoModels, Workbench  # noqa: E402
from pix2pix_zero.host.sampling.checks import AUTO, SCHEDULERS  # noqa: E402
from pix2pix_zero.nodes.demo import DIFFUSION, FLOW, TRANSFORMER  # noqa: E402

OUTPUT = Path(__file__).resolve().parent.parent / "demo_output"


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    names = [method.name for method in METHODS]
    parser = argparse.ArgumentParser(prog="dev.py bench quality", description=__doc__)
    parser.add_argument("--scenes", type=int, help="of each edit, to measure on (default: 64)")
    parser.add_argument("--tuning-scenes", type=int, help="of each edit, to set the knobs on (default: as many)")
    parser.add_argument("--steps", type=int, help="default: 50; `fast` takes 15 at most")
    parser.add_argument("--edits", nargs="+", choices=EDITS, default=list(EDITS), metavar="NAME", help=", ".join(EDITS))
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--set",
        nargs="+",
        type=setting,
        default=[],
        metavar="NAME=NUMBER",
        help="inputs of the sampler's node to try in place of their defaults, such as guidance_strength=0.2",
    )
    parser.add_argument(
        "--values", type=int, help="how many values of each knob to try, from the middle (default: all)"
    )
    parser.add_argument("--threads", type=int, help="default: torch's choice; 1 with --quick")
    parser.add_argument(
        "--quick", action="store_true", help="2 scenes, 1 to tune on, 4 steps, one knob value: to try the benchmark"
    )
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--flow", action="store_true", help="with the demo model as a flow model")
    network.add_argument("--dit", action="store_true", help="with the demo's diffusion transformer")
    parser.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default=AUTO,
        help="whose noise levels the steps lie on (default: of each method)",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write to (default: demo_output)")
    options = parser.parse_args(arguments)
    options.scenes = options.scenes or (2 if options.quick else 64)
    options.tuning_scenes = options.tuning_scenes or (1 if options.quick else options.scenes)
    options.steps = options.steps or (4 if options.quick else 50)
    options.values = options.values or (1 if options.quick else max(len(method.values) for method in METHODS))
    options.threads = options.threads or (1 if options.quick else None)
    return options


def setting(text: str) -> tuple[str, float]:
    """A name in SETTINGS and its number. Raises ValueError for anything else."""
    name, _, number = text.partition("=")
    if name not in SETTINGS or name == "preset":
        raise ValueError(text)
    return name, float(number)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    logging.getLogger().setLevel(logging.WARNING)
    comfy.utils.set_progress_bar_enabled(False)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    left_out = (*DIFFUSING, *NEEDING_A_UNET) if options.dit else DIFFUSING if options.flow else ()
    chosen = [method for method in METHODS if method.name in options.methods and method.name not in left_out]
    methods = [method.with_values(options.values) for method in chosen]
    objective = TRANSFORMER if options.dit else FLOW if options.flow else DIFFUSION
    models, judge = DemoModels.load(objective, options.scheduler), load_judge()
    results = {}
    for name in options.edits:
        edit = EDITS[name]
        tuning, test = (
            Workbench(models, edit, draw_scenes(edit, count, seed), options.steps, dict(options.set))
            for count, seed in ((options.tuning_scenes, TUNING_SEED), (options.scenes, TEST_SEED))
        )
        results[name], pictures = unedited(test, judge)
        sheet = {
            "source": test.scenes.sources,
            "ground truth": test.scenes.truths,
            "plain DDIM": pictures["plain DDIM"],
        }
        for method in methods:
            result, edited = compare(method, tuning, test, judge, lambda line: say(f"{name}, {line}"))
            results[name].append(result)
            sheet[f"{method.name}\n{result.knob} {result.value:g}"] = edited
        print(f"\n{name}, {options.scenes} test scenes, {options.steps} steps\n\n{table(results[name])}", flush=True)
        print(f"\n{name}, pasted back into the source:\n\n{pasted_table(results[name])}", flush=True)
        contact_sheet(sheet).save(options.output / f"bench_quality_{name}.png")
        write(results, options)
    print("\nPasted: each in its own area; errors to the rendered pictures, not to what the autoencoder makes of them.")
    print("\nMeans over the test scenes, with 95 % intervals.")
    print("* under 95 % of the ground truth's hits at any knob value on the tuning scenes")
    print(f"wrote bench_quality.json, bench_quality.png and the contact sheets to {options.output.name}/")


def write(results: dict, options: argparse.Namespace) -> None:
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    found = {name: [asdict(result) for result in rows] for name, rows in results.items()}
    report = json.dumps({"settings": settings, "torch": torch.__version__, "results": found}, indent=1)
    (options.output / "bench_quality.json").write_text(report + "\n", encoding="utf-8")
    trade_off(results).save(options.output / "bench_quality.png")


if __name__ == "__main__":
    main()
