"""Whether an edit of the whole picture has left things where they were: the teacher now and then moves one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import Pairs

WINDOW, STRIDE = 13, 4  # pixels
TOGETHER = 64  # pictures
EDGES = 0.3  # of the strongest window's edges: what fewer has says nothing


def edge_agreement(source: Tensor, edited: Tensor) -> Tensor:
    """How well the edges of two pictures agree where they agree least, [B] in -1..1; 1: all are in place.

    `source`, `edited`: [B, 3, H, W] in 0..1, at least a window large. In each window with edges in either picture, the
    correlation of their gradients in double-angle form (Granlund 1978), which brightness, contrast and its sign do not change.
    """
    one, other = _double_angles(source), _double_angles(edited)
    product, ours, theirs = (_in_windows(values) for values in (one * other, one.square(), other.square()))
    correlation = product / (ours * theirs).sqrt().clamp_min(1e-9)
    told = (ours > EDGES * ours.amax((2, 3), keepdim=True)) | (theirs > EDGES * theirs.amax((2, 3), keepdim=True))
    return torch.where(told, correlation, torch.ones_like(correlation)).amin((1, 2, 3))


def most_in_place(pairs: Pairs, share: float) -> Pairs:
    """The share (0..1) of the pairs whose edges agree best, in their order."""
    indices = range(len(pairs))
    parts = (list(indices[first : first + TOGETHER]) for first in range(0, len(pairs), TOGETHER))
    agreement = torch.cat([edge_agreement(*pairs.take(part)[:2]) for part in parts])
    kept = set(agreement.argsort(descending=True)[: max(1, round(share * len(pairs)))].tolist())
    return pairs.only([index in kept for index in indices])


def _double_angles(pictures: Tensor) -> Tensor:
    """The gradient of each pixel of the smoothed gray picture, its angle doubled, [B, 2, H, W]."""
    gray = F.avg_pool2d(F.pad(pictures.mean(1, keepdim=True), (1, 1, 1, 1), "replicate"), 3, 1)
    across = F.pad(gray[..., 2:] - gray[..., :-2], (1, 1, 0, 0))
    down = F.pad(gray[..., 2:, :] - gray[..., :-2, :], (0, 0, 1, 1))
    length = (across.square() + down.square()).sqrt().clamp_min(1e-9)
    return torch.cat([across.square() - down.square(), 2 * across * down], 1) / length


def _in_windows(values: Tensor) -> Tensor:
    """Means over all windows of what the channels add up to, [B, 1, rows, columns]."""
    return F.avg_pool2d(values.sum(1, keepdim=True), WINDOW, STRIDE, WINDOW // 2, count_include_pad=False)
