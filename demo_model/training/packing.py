"""The last stage: everything into the one file that ships, in half precision; the kernels of the decoder's trunk in 8 bits."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..eight_bits import in_eight_bits

AUTOENCODER_PREFIX = "first_stage_model."
CAPTIONER_PREFIX = "captioner."


def pack_weights(diffusion: Path, autoencoder: Path, captioner: Path, output: Path) -> None:
    """Merge the diffusion model's file with the tensors of autoencoder and captioner into `output`."""
    tensors = {k: _half(v) for k, v in load_file(diffusion).items() if not k.startswith(AUTOENCODER_PREFIX)}
    tensors |= packed_autoencoder(load_file(autoencoder))
    tensors |= {CAPTIONER_PREFIX + k: _half(v) for k, v in load_file(captioner).items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, output)


def packed_autoencoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's weights as they are in the file."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("decoder.trunk.") and value.ndim == 4:
            tensors |= in_eight_bits(AUTOENCODER_PREFIX + name, value)
        else:
            tensors[AUTOENCODER_PREFIX + name] = _half(value)
    return tensors


def _half(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() and value.ndim > 0 else value
