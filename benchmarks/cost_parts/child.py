"""A job in a process of its own, so that neither memory nor another model of the job before is left in it."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .jobs import Job

# Freed memory goes back to the system at once, so that the high-water mark is that of the tensors alive. It costs time.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ENTRY = f"from {__name__} import main; main()"


class JobError(Exception):
    """A job that ended without a result; its last words."""


def run_in_child(job: "Job", threads: int, entry: str = ENTRY, returns_memory: bool | None = None) -> dict:
    """The result of a job, a dataclass, in a new process that runs the code `entry`. Raises JobError if there is none.

    `returns_memory`: give freed memory back at once; by default for the kinds that measure it.
    """
    if returns_memory is None:
        returns_memory = job.kind in ("count", "growth")
    variables = {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        **(RETURN_FREED_MEMORY if returns_memory else {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        # Not in the current folder: Python would look there first, and our nodes/ would hide ComfyUI's nodes.py.
        answer = Path(folder) / "result.json"
        command = [sys.executable, "-c", entry, json.dumps(asdict(job)), str(answer)]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True, check=False
        )
        if not answer.exists():
            words = done.stderr.strip().splitlines()[-1:] or ["no reason was given"]
            raise JobError(f"ended with status {done.returncode}: {words[0]}")
        return json.loads(answer.read_text())


def choose_device() -> None:
    """To be done before the first of ComfyUI's modules looks for a device."""
    import torch
    from comfy.cli_args import args as host_options

    host_options.cpu = host_options.cpu or not torch.cuda.is_available()


def main() -> None:
    """Carry out the job of the command line and write its result to the file named there."""
    choose_device()
    logging.getLogger().setLevel(logging.WARNING)
    from .jobs import Job, run_job

    job, answer = sys.argv[1:]
    result = run_job(Job(**json.loads(job)))
    Path(answer).write_text(json.dumps(result))
