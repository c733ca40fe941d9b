"""What a student is told of its error."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

BLURS = (5, 17)  # pixels: the parts of a subject, and its outline

Features = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class LossWeights:
    """`inside`: how much more a pixel of the edited area counts. `change`: how much more one counts that turns from black to
    white, so that what has to disappear does not stay as a ghost; not where whole pictures are edited, see
    `for_whole_pictures`. `slopes`: of the slope error beside the pixels': thin lines that are left are small in the pixels, and
    large in the slopes. `features`: of the feature error beside the pixels'.
    """

    inside: float = 4.0
    change: float = 16.0
    slopes: float = 4.0
    features: float = 0.1

    def for_whole_pictures(self) -> "LossWeights":
        """The same without `change`. Where all is edited, everything changes and nothing has to disappear. The pixels that a
        teacher clears when it moves a thing change most there: with `change`, a few such pairs outvote the many that keep it.
        """
        return replace(self, change=0.0)


def pixel_weights(source: Tensor, target: Tensor, area: Tensor, weights: LossWeights) -> Tensor:
    """How much each pixel counts, [B, 1, H, W] with mean 1 over the batch.

    `source`, `target`: [B, 3, H, W] in 0..1; `area`: [B, 1, H, W], 1 where edited.
    """
    change = (target - source).abs().mean(1, keepdim=True)
    counted = 1 + weights.inside * area + weights.change * change
    return counted / counted.mean()


def pixel_loss(output: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """The weighted L1 error, plus that of the blurred error, which sees a ghost as a whole. All [B, C, H, W]."""
    error = output - target
    loss = (counted * error.abs()).mean()
    for size in BLURS:
        blurred, weight = (
            F.avg_pool2d(x, size, size // 4, size // 2, count_include_pad=False) for x in (error, counted)
        )
        loss = loss + (weight * blurred.abs()).mean()
    return loss


def slope_loss(output: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """The weighted L1 error of the differences between neighbouring pixels, across plus down. All [B, C, H, W]."""
    error = output - target
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    return (counted[..., 1:] * across.abs()).mean() + (counted[..., 1:, :] * down.abs()).mean()


def feature_loss(features: Features, output: Tensor, target: Tensor) -> Tensor:
    """The L1 error of each feature map as a part of the map's own mean, averaged over the maps.

    After LPIPS (Zhang et al., CVPR 2018) and, for the teacher's own networks as judges, Diffusion2GAN (Kang et al., 2024).
    """
    with torch.no_grad():
        wanted = features(target)
    errors = [
        (found - goal).abs().mean() / goal.abs().mean().clamp_min(1e-6)
        for found, goal in zip(features(output), wanted, strict=True)
    ]
    return torch.stack(errors).mean()
