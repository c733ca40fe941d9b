"""The measurements. `run_job` carries one out in this process and returns what goes into the report."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import comfy.model_management
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .counting import Gradient, Watch, flop_counter
from .memory import Peak
from .reference import plain_gradient
from .unets import FULL, QUICK, float64_unet
from .variants import Edit, load_variant, runs_in_executor, usual_shares

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WARM_UP_SIZE = 64


@dataclass(frozen=True)
class Job:
    """One measurement of one variant. `steps`: one run for each number. `gradients`: the file they are kept in."""

    kind: str
    variant: str
    dtype: str
    size: int
    steps: tuple[int, ...]
    quick: bool
    gradients: str

    @property
    def shape(self):
        return QUICK if self.quick else FULL


def run_job(job: Job) -> dict:
    if job.kind == "gradient":
        return compare_gradient(job)
    with torch.inference_mode(runs_in_executor(job.variant)):
        return {"count": count, "time": measure_time, "growth": measure_growth}[job.kind](job)


class Run:
    """A loaded variant and its edit. `peak` counts from the memory in use once the UNet has run."""

    def __init__(self, job: Job):
        self.variant = load_variant(job.variant, job.shape, DTYPES[job.dtype])
        self.edit = Edit.draw(job.shape, job.size)
        self.device = comfy.model_management.get_torch_device()
        self.variant.one_forward(self.edit)
        self.peak = Peak(self.device)

    def warm_up(self, job: Job) -> None:
        # GPUs choose their kernels by size; on a CPU a small picture will do.
        size = job.size if self.device.type == "cuda" else min(job.size, WARM_UP_SIZE)
        self.whole(Edit.draw(job.shape, size), 1)

    def whole(self, edit: Edit, steps: int) -> torch.Tensor:
        return self.variant.redraw(edit, self.variant.invert(edit, steps), steps)

    def clock(self) -> np.ndarray:
        """Seconds of the wall clock and of this process on all cores, which other programs disturb less."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return np.array([time.perf_counter(), time.process_time()])

    def timed(self, function: Callable, *args) -> tuple:
        start = self.clock()
        result = function(*args)
        return result, self.clock() - start


def count(job: Job) -> dict:
    """Passes and operations for each number of steps; the peak of memory and the first gradient of the last.

    Operations are in FE: those of one forward pass of the same UNet for one picture.
    """
    run = Run(job)
    with flop_counter() as counter:
        run.variant.one_forward(run.edit)
    forward = counter.get_total_flops()

    def counted(steps: int) -> tuple[dict, Watch]:
        watch = Watch(run.edit.positive)
        with watch.over(run.variant.unet):
            samples = run.whole(run.edit, steps)
        finite = bool(samples.isfinite().all())
        return {"steps": steps, **asdict(watch.passes), "fe": watch.passes.flops / forward, "finite": finite}, watch

    counts, unguided = [], []
    for steps in job.steps:
        run.peak.reset()
        result, watch = counted(steps)
        counts.append(result)
    peak = run.peak.above_base()
    if watch.first is not None:
        gradient = watch.first.gradient * run.variant.texts_per_gradient
        save_file({**asdict(watch.first), "gradient": gradient}, job.gradients)
    guided, held = usual_shares(job.variant)
    if guided < 1:
        run.variant.strength = 0.0
        unguided = [counted(steps)[0] for steps in job.steps]
    return {
        "gflop_per_forward": forward / 1e9,
        "counts": counts,
        "unguided_counts": unguided,
        "guided_share": guided,
        "held_share": held,
        "peak_bytes": peak,
        "finite": all(result["finite"] for result in counts),
    }


def measure_time(job: Job) -> dict:
    """Seconds of inverting and editing, and of editing again with the same inversion."""
    run = Run(job)
    run.warm_up(job)
    (steps,) = job.steps
    run.peak.reset()
    inverted, inversion = run.timed(run.variant.invert, run.edit, steps)
    samples, edit = run.timed(run.variant.redraw, run.edit, inverted, steps)
    again = edit
    if run.variant.uses_inversion_again:
        _, again = run.timed(run.variant.redraw, run.edit, inverted, steps)
    guided, held = usual_shares(job.variant)
    if guided < 1:
        run.variant.strength = 0.0
        _, unguided = run.timed(run.variant.redraw, run.edit, inverted, steps)
        _, forward = run.timed(run.variant.one_forward, run.edit)
        edit, again = (guided * seconds + (1 - guided) * unguided - held * steps * forward for seconds in (edit, again))
    phases = {"inversion": inversion, "edit": edit, "whole": inversion + edit, "edit_again": again}
    return {
        **{phase: wall for phase, (wall, _) in phases.items()},
        "whole_cpu": phases["whole"][1],
        "peak_bytes": run.peak.above_base() if run.peak.on_gpu else None,
        "finite": bool(samples.isfinite().all()),
    }


def measure_growth(job: Job) -> dict:
    """The peak of memory for each number of steps."""
    run = Run(job)
    run.warm_up(job)
    peaks = {}
    for steps in job.steps:
        run.peak.reset()
        run.whole(run.edit, steps)
        peaks[str(steps)] = run.peak.above_base()
    return {"peak_bytes": peaks}


def compare_gradient(job: Job) -> dict:
    """The relative error of the kept gradient."""
    found = Gradient(**load_file(job.gradients))
    expected = plain_gradient(float64_unet(job.shape), found, Edit.draw(job.shape, job.size).source)
    gradient = found.gradient.double()
    scale = float(gradient.norm() / expected.norm())
    if job.dtype == "fp16" and 0 < scale < math.inf:
        gradient = gradient / 2 ** round(math.log2(scale))  # the loss may have been scaled against underflow
    return {"relative_error": float((gradient - expected).norm() / expected.norm())}
