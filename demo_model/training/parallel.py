"""Run one function in several single-thread processes that average their gradients.

On tensors this small, processes with one thread each train faster than one process with several threads.
"""

import tempfile
from collections.abc import Callable
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


def shared_progress(rank: int, progress: float) -> float:
    """Rank 0's `progress` on every rank, so that all of them stop at the same step."""
    if not dist.is_initialized():
        return progress
    value = torch.tensor([progress], dtype=torch.float64)
    dist.broadcast(value, 0)
    return value.item()
