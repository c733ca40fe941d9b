"""What an edit costs, beside diffusers' pipeline: operations, passes, time and memory. `python dev.py bench cost`

The same random weights of Stable Diffusion 1.5's shape in diffusers' pipeline, in the authors' update and in this pack
with each preset; for scale, the plain inversion and sampling of any edit and ComfyUI's KSampler. Each measurement runs in
a process of its own, the timed ones in alternation. Steps are those of a usual edit of 50: where a preset guides only some
of them, guided and unguided ones are measured apart and mixed. Writes tables and demo_output/bench_cost.json.
"""

import argparse
import itertools
import json
import logging
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from pix2pix_zero.benchmarks.cost_parts.child import JobError, choose_device, run_in_child

choose_device()

from pix2pix_zero.benchmarks.cost_parts.jobs import DTYPES, Job, run_job  # noqa: E402
from pix2pix_zero.benchmarks.cost_parts.report import Results, summarize, tables  # noqa: E402
from pix2pix_zero.benchmarks.cost_parts.unets import FULL, QUICK, make_weights  # noqa: E402
from pix2pix_zero.benchmarks.cost_parts.variants import variant_names  # noqa: E402
from pix2pix_zero.devtools.process import orderly_end  # noqa: E402

OUTPUT = Path(__file__).resolve().parent.parent / "demo_output" / "bench_cost.json"
COUNTED_STEPS = (1, 2)  # the slope between them is the cost of a step
GROWTH_STEPS = [10, 50]


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="dev.py bench cost", description=__doc__)
    parser.add_argument("--size", type=int, help="pixels of a side (default: 512 on a GPU, else 256; 64 with --quick)")
    parser.add_argument(
        "--steps", type=int, default=50 if on_gpu else 3, help="of the timed edits (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of timing (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: all cores; 1 with --quick")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES] if on_gpu else ["fp32"])
    parser.add_argument("--variants", nargs="+", choices=variant_names(), default=variant_names(), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a small UNet, all in this process: to try the benchmark")
    parser.add_argument(
        "--growth",
        type=int,
        nargs="*",
        default=GROWTH_STEPS if on_gpu else None,
        metavar="STEPS",
        help="also measure how memory grows from 10 to 50 steps, or others; always done on a GPU",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: demo_output/bench_cost.json")
    options = parser.parse_args(arguments)
    options.size = options.size or (64 if options.quick else 512 if on_gpu else 256)
    options.threads = options.threads or (1 if options.quick else os.cpu_count())
    if options.growth == []:
        options.growth = GROWTH_STEPS
    return options


def measure(dtype: str, options: argparse.Namespace, folder: Path) -> dict[str, Results]:
    """Run all jobs of one data type, the timed ones in alternation."""
    results = {name: Results() for name in options.variants}
    steps = {"count": COUNTED_STEPS, "gradient": (), "growth": options.growth, "time": (options.steps,)}
    kinds = ["count", "gradient", *(["growth"] if options.growth else []), *["time"] * options.rounds]
    for kind, (name, result) in itertools.product(kinds, results.items()):
        gradients = folder / f"{name}.safetensors"
        if kind in result.failures or kind == "gradient" and not gradients.exists():
            continue
        job = Job(kind, name, dtype, options.size, tuple(steps[kind]), options.quick, str(gradients))
        start = time.perf_counter()
        try:
            result.done[kind].append(run_job(job) if options.quick else run_in_child(job, options.threads))
        except JobError as failure:
            result.failures[kind] = str(failure)
        print(f"{dtype} {name}: {kind}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return results


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    logging.getLogger().setLevel(logging.WARNING)
    if options.quick:
        torch.set_num_threads(options.threads)
    make_weights(QUICK if options.quick else FULL)
    report = {"settings": settings(options), "machine": machine(), "results": {}}
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory() as folder:
            results = measure(dtype, options, Path(folder))
        report["results"][dtype] = summarize(results)
        print(f"\n{dtype}, {options.size} x {options.size} pixels, {options.steps} steps\n")
        print(tables(report["results"][dtype]))
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output.name}")


def settings(options: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(options).items() if name != "output"}


def machine() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "platform": platform.platform(), "cores": os.cpu_count(), "gpu": gpu}


if __name__ == "__main__":
    with orderly_end():  # and with it the job that is running
        main()
