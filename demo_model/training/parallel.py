"""Run one function in several single-thread processes that average their gradients.

On tensors this small, processes with one thread each train faster than one process with several threads.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, world: int, store: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(function: Callable, world: int, *arguments: object) -> None:
    """Call `function(rank, *arguments)` on `world` ranks, or in this process if `world` is 1."""
    if world == 1:
        function(0, *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, str(Path(folder) / "store"), function, arguments), nprocs=world)


@dataclass
class Pace:
    """How long a stage trains: `minutes` with `batch` pictures on each rank, after `warmup` steps. `log`: a file."""

    minutes: float
    batch: int
    warmup: int = 60
    log: str | None = None
    _start: float = field(default=0.0, init=False)

    def start(self) -> None:
        """To be called on each rank ahead of the first step."""
        self._start = time.monotonic()

    def progress(self) -> float:
        """How far rank 0 is, in 0..1, on every rank, so that all of them stop at the same step."""
        progress = (time.monotonic() - self._start) / (60 * self.minutes)
        if not dist.is_initialized():
            return progress
        value = torch.tensor([progress], dtype=torch.float64)
        dist.broadcast(value, 0)
        return value.item()

    def report(self, line: str) -> None:
        logging.info(line)
        if self.log is not None:
            with Path(self.log).open("a") as file:
                file.write(line + "\n")
