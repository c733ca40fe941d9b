"""Weights in 8 bits with a scale for each row, a quarter of their size; the demo's files hold some of theirs so."""

import torch
from torch import Tensor

ROW_SCALES = ".row_scales"


def in_eight_bits(name: str, value: Tensor) -> dict[str, Tensor]:
    """A matrix, or a kernel of any dimensions, as int8 [rows, ...] and the fp32 scales of its rows [rows, 1, ...]."""
    value = value.float()
    scales = value.abs().flatten(1).amax(1).clamp_min(1e-12).view(-1, *[1] * (value.ndim - 1)) / 127
    return {name: (value / scales).round().to(torch.int8), name + ROW_SCALES: scales}


def unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor under its own name, in fp32 where there are scales; without those that are in 8 bits and have none."""
    scaled = {name for name in tensors if name + ROW_SCALES in tensors}
    used = {name + ROW_SCALES for name in scaled}
    return {
        name: value * tensors[name + ROW_SCALES] if name in scaled else value
        for name, value in tensors.items()
        if name in scaled or (name not in used and value.dtype is not torch.int8)
    }
