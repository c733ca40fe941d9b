"""Every UNet family at its full size, with random weights. `python dev.py bench families`

Each is built by ComfyUI's detection from the names and shapes of the family's file, inverted and edited with guidance
in few steps, in a process of its own. Then the memory of a guided pass is counted exactly at the size the family was made
for, without a machine that has it: see families_parts/accounting.py. On a CPU, seconds are those of all cores together.
Writes tables and demo_output/bench_families.json.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import psutil
import torch
from pix2pix_zero.benchmarks.cost_parts.child import JobError, choose_device, run_in_child
from pix2pix_zero.host.sampling.edit import PRESETS  # noqa: E402

choose_device()

from pix2pix_zero.benchmarks.families_parts.architectures import FAMILIES  # noqa: E402
from pix2pix_zero.benchmarks.families_parts.full_size import DTYPES, FamilyJob  # noqa: E402
from pix2pix_zero.devtools.process import orderly_end  # noqa: E402

OUTPUT = Path(__file__).resolve().parent.parent / "demo_output" / "bench_families.json"
GIB = 2**30
ROOM = 6 * GIB  # beside the weights, for the run and other programs
HALF = {"fp32": "bf16"}


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="dev.py bench families", description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES], metavar="NAME")
    parser.add_argument("--size", type=int, help="pixels of a side (default: the family's own on a GPU, else 256)")
    parser.add_argument("--steps", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16" if on_gpu else "fp32", help="default: %(default)s")
    parser.add_argument("--only-memory", action="store_true", help="count memory, run nothing")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: demo_output/bench_families.json")
    options = parser.parse_args(arguments)
    options.on_gpu = on_gpu
    return options


def measure(name: str, options: argparse.Namespace) -> dict:
    """The results of both jobs of a family; in place of one that gave none, its last words."""
    family = FAMILIES[name]
    accounted = _run(FamilyJob("account", name, family.resolution, 0, "bf16", ""), options)
    if options.only_memory or "failure" in accounted:
        return {"memory": accounted}
    size = options.size or (family.resolution if options.on_gpu else 256)
    dtype, preset = options.dtype, options.preset
    if not options.on_gpu and 2 * accounted["weights"] + ROOM > psutil.virtual_memory().available:
        # Cast for each layer: any other preset would hold copies of many weights in fp32.
        dtype, preset = HALF.get(dtype, dtype), "low memory"
    job = FamilyJob("run", name, size, options.steps, dtype, preset)
    return {"memory": accounted, "run": {**_run(job, options), "size": size, "dtype": dtype, "preset": preset}}


def _run(job: FamilyJob, options: argparse.Namespace) -> dict:
    start = time.perf_counter()
    try:
        entry = f"from {__package__ or 'pix2pix_zero.benchmarks'}.families_parts.child import main; main()"
        result = run_in_child(job, options.threads, entry, returns_memory=job.dtype == "fp32")
    except JobError as failure:
        result = {"failure": str(failure)}
    print(f"{job.name}: {job.kind}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return result


def tables(results: dict[str, dict]) -> str:
    """What was run, and what was counted."""
    lines = [
        f"{'family':13} {'loaded as':20} {'params':>7} {'sites':>5} {'size':>5} {'dtype':>5} {'preset':>10} "
        f"{'CFG step':>9} {'guided':>7} {'peak':>8} {'back':>8} finite"
    ]
    for name, result in results.items():
        run = result.get("run", {})
        if "seconds" in run:
            seconds = run["seconds"]
            lines.append(
                f"{name:13} {run['class']:20} {run['parameters'] / 1e6:6.0f}M {run['sites']:5} {run['size']:5} "
                f"{run['dtype']:>5} {run['preset']:>10} {seconds['plain']:7.2f} s {seconds['guided'] / seconds['plain']:6.2f}x "
                f"{run['peak']['guided'] / GIB:4.2f} GiB {run['reconstruction_error']:8.0e} {run['finite']}"
            )
        elif "failure" in run:
            lines.append(f"{name:13} {run['failure']}")
    lines += [
        "",
        "Counted for one picture in 16 bit, GiB. Peak of a guided pass with each mode of checkpointing; in brackets what",
        "the pack expects. Kept: what the graph holds with none, by part.",
        f"{'family':13} {'size':>5} {'weights':>7} {'maps':>5} {'plain':>5} {'none':>13} {'feed-forward':>13} {'blocks':>13}"
        "  kept",
    ]
    for name, result in results.items():
        memory = result["memory"]
        if "failure" in memory:
            lines.append(f"{name:13} {memory['failure']}")
            continue
        peaks = " ".join(
            f"{peak / GIB:5.2f} ({memory['estimate'][mode] / GIB:5.2f})" for mode, peak in memory["peak"].items()
        )
        parts = ", ".join(f"{part} {kept / GIB:.2f}" for part, kept in sorted(memory["parts"].items()))
        lines.append(
            f"{name:13} {FAMILIES[name].resolution:5} {memory['weights'] / GIB:7.2f} {memory['maps'] / GIB:5.2f} "
            f"{memory['plain'] / GIB:5.2f} {peaks}  {parts}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    results = {}
    for name in options.families:
        results[name] = measure(name, options)
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(tables(results))
    print(f"wrote {options.output.name}")


if __name__ == "__main__":
    with orderly_end():  # and with it the job that is running
        main()
