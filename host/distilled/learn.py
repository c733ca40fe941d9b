"""Distill Edit without ComfyUI's window, on one GPU or, under torchrun, on several:

    torchrun --nproc-per-node 2 PACK/host/distilled/learn.py --pairs FOLDER --out NAME.safetensors --steps 20000

PACK is this pack's folder. It trains as the node does, on pixels and with `--sharpness` against an adversary; a VAE's features
are the node's alone. The state lies beside the file: the same command goes on with a training that was ended, also with
another number of processes.
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # torchrun starts a file: the same again as a module of the pack
    pack = Path(__file__).absolute().parents[2]
    sys.path[0] = str(pack.parent)
    runpy.run_module(f"{pack.name}.host.distilled.learn", run_name="__main__", alter_sys=True)
    sys.exit()

import torch
import torch.distributed as distributed

from ...distillation.learning import Report, Settings, Training
from ...distillation.pairs import PairError, PairFolder
from ...distillation.processes import place
from ..networks.students import MAKERS, make_student, save_student

SAY_EVERY = 100  # steps
log = logging.getLogger("pix2pix_zero.distilled")


def begin_processes(device: str) -> torch.device:
    """Join the processes that torchrun has started, if it has; the device of this one. `device`: cuda or cpu."""
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def train(options: argparse.Namespace) -> Path:
    """Train and write the student; its file. Raises ValueError if the pairs or the state that is there do not do."""
    device = begin_processes(options.device)
    number, count = place()
    if options.batch % count:
        raise ValueError(f"--batch {options.batch} cannot be shared by {count} processes. Give a multiple.")
    pairs = PairFolder(options.pairs).read()
    settings = Settings(
        steps=options.steps,
        batch=options.batch,
        crop=options.crop,
        learning_rate=options.learning_rate,
        half=device.type == "cuda",
        seed=options.seed,
        sharpness=options.sharpness,
    )
    student = make_student(options.size, options.seed).to(device, memory_format=torch.channels_last)
    run = Training(student, pairs, settings, checkpoint=options.out.with_suffix(".training"))

    def say(report: Report) -> None:
        if number == 0 and (report.step % SAY_EVERY == 0 or report.progress == 1):
            left = (options.steps - report.step) / max(report.rate, 1e-9)
            error = run.held_out_error()
            log.info("step %d: loss %.4f, held out %.2f of 255, %.0f s left", report.step, report.loss, error, left)

    run.run(say)
    if number == 0:
        facts = {"description": options.description, "pairs": len(pairs), "size": options.size, "steps": run.step}
        facts["agreement"] = {"inside": round(run.held_out_error(), 3)}
        save_student(run.average, options.out, facts)
    return options.out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=Path, required=True, help="a data set of Save Edit Pair")
    add("--out", type=Path, required=True, help="the file to write, for models/upscale_models")
    add("--size", choices=MAKERS, default="small", help="default: %(default)s")
    add("--steps", type=int, default=3000, help="default: %(default)s")
    add("--batch", type=int, default=16, help="pairs in a step, of all processes together (default: %(default)s)")
    add("--crop", type=int, default=256, help="side of the squares that are trained on (default: %(default)s)")
    add("--learning-rate", type=float, default=Settings.learning_rate, help="default: %(default)s")
    add("--sharpness", type=float, default=0.0, help="of the adversary, 0 for none (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--description", default="", help="what the edit does and which model made it; kept in the file")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        train(parser.parse_args(arguments))
    except (PairError, ValueError) as failure:
        sys.exit(str(failure))
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
