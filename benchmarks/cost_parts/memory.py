"""How far memory rises above what was in use before."""

import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """The highest use of memory in bytes, of the GPU where there is one, since `reset`, above what is in use now."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            self.base = torch.cuda.memory_allocated()
        else:
            _trim()
            self.base = psutil.Process().memory_info().rss

    def reset(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            _trim()
            _forget_high_water_mark()

    def above_base(self) -> int:
        return max(0, (torch.cuda.max_memory_allocated() if self.on_gpu else _high_water_mark()) - self.base)


def _trim() -> None:
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def _forget_high_water_mark() -> None:
    """Where the system allows it; elsewhere the mark is that of the whole process, which here only does one thing."""
    try:
        CLEAR.write_text("5")
    except OSError:
        pass


def _high_water_mark() -> int:
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
