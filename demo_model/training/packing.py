"""Stage 5: everything into the one file that ships."""

from pathlib import Path

from safetensors.torch import load_file, save_file

CAPTIONER_PREFIX = "captioner."


def pack_weights(diffusion: Path, captioner: Path, output: Path) -> None:
    """Merge the diffusion model's file and the captioner's tensors, in half precision, into `output`."""
    tensors = load_file(diffusion)
    tensors |= {CAPTIONER_PREFIX + k: v for k, v in load_file(captioner).items()}
    halved = {k: v.half() if v.is_floating_point() and v.ndim > 0 else v for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in halved.items()}, output)
