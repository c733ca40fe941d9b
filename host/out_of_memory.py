"""What says that memory ran out, on any device, and what is left to do then."""

import gc
import re
import traceback

import comfy.model_management
import torch

# As CUDA, ROCm, MPS, XPU, the allocators of the CPU, C++, cuBLAS and cuDNN, and oneDNN say it. oneDNN's "primitive descriptor" is
# an operation that it does not know.
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|failed to allocate|unable to allocate"
    r"|bad_alloc|bad allocation|_alloc_failed|out_of_(host|device)_memory|out_of_resources"
    r"|could not create a (primitive(?! descriptor)|memory object)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the device's or the computer's, ran out."""
    host = comfy.model_management
    kinds = [MemoryError, getattr(torch, "OutOfMemoryError", MemoryError)]
    if host.OOM_EXCEPTION is not Exception:  # the host's stand-in where PyTorch has no such class
        kinds.append(host.OOM_EXCEPTION)
        if hasattr(host, "is_oom") and host.is_oom(error):  # ComfyUI 0.16 has only the class
            return True
    said = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    return bool(said) or isinstance(error, tuple(kinds))


def out_of_memory(words: str) -> Exception:
    """An error that says that memory ran out, of the class that the host answers by unloading its models."""
    kind = comfy.model_management.OOM_EXCEPTION
    return (MemoryError if kind is Exception else kind)(words)


def refusal(error: Exception, socket: str) -> Exception:
    """What to raise in the place of an error that says so, naming the socket, once the work that failed holds nothing more."""
    if str(error).startswith(f"{socket}: "):
        return error
    traceback.clear_frames(error.__traceback__)  # their tensors would stay as long as the host shows the error
    gc.collect()
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    return out_of_memory(
        f"{socket}: memory ran out. Take smaller pictures, fewer at once, or fewer steps, or free memory that other programs "
        "hold, then run it again."
    )
