"""Noise regularization: pull a predicted noise map towards white Gaussian noise (pix2pix-zero section 3.1, eq. 3).

The two losses, their pyramid and step sizes follow the paper and the authors' code, with three differences: shifts
come from a seeded generator and are never 0 (a shift of 0 penalizes the variance itself), KL is taken per sample rather
than over the batch, and gradients are closed-form, vectorized over samples and channels, without autograd.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

SMALLEST_LEVEL = 8


@dataclass(frozen=True)
class NoiseRegularization:
    """Strengths and repetitions. Defaults are the paper's; a weight of 0 switches its loss off."""

    autocorrelation_weight: float = 20.0
    kl_weight: float = 20.0
    steps: int = 5
    rolls: int = 5

    @property
    def is_active(self) -> bool:
        return self.steps > 0 and (self.autocorrelation_weight != 0 and self.rolls > 0 or self.kl_weight != 0)


def pyramid_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of each level: halved by 2x2 average pooling until the smaller side is at most 8."""
    sizes = [(height, width)]
    while min(sizes[-1]) > SMALLEST_LEVEL:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def draw_shifts(channels: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Shifts, uniform in [1, S/2] with S the smaller side of the level: int64 [channels, levels].

    A level with a side of 1 has no neighbour to correlate with; its shift is 0 and the loss skips it. The shifts are
    shared by the samples of a batch, so that an image gives the same result alone and in company.
    """
    sides = [min(size) for size in pyramid_sizes(height, width)]
    columns = [
        torch.randint(1, side // 2 + 1, (channels,), generator=generator)
        if side > 1
        else torch.zeros(channels, dtype=torch.int64)
        for side in sides
    ]
    return torch.stack(columns, dim=1)


def autocorrelation_gradient(noise: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Gradient of eq. 3's pairwise loss: the sum over channels, levels and both axes of mean(n * roll(n, shift))^2.

    `noise`: [B, C, H, W] float; `shifts`: int64 [C, levels] from `draw_shifts`. Returns [B, C, H, W].
    """
    levels = [noise]
    for _ in range(shifts.shape[1] - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    gradient = None
    for level, shift in zip(reversed(levels), shifts.flip(1).unbind(1)):
        here = _level_gradient(level, shift) if min(level.shape[-2:]) > 1 else torch.zeros_like(level)
        gradient = here if gradient is None else here + _unpool(gradient, level.shape[-2:])
    return gradient


def _level_gradient(noise: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    height, width = noise.shape[-2:]
    shift = shift.to(noise.device)[:, None]
    gradient = torch.zeros_like(noise)
    for axis, size in ((-2, height), (-1, width)):
        index = torch.arange(size, device=noise.device)[None]
        shape = (1, -1, size, 1) if axis == -2 else (1, -1, 1, size)
        ahead, behind = (
            noise.gather(axis, ((index + sign * shift) % size).view(shape).expand_as(noise)) for sign in (-1, 1)
        )
        mean = (noise * ahead).mean((-2, -1), keepdim=True)
        gradient = gradient + mean * (ahead + behind) * (2 / (height * width))
    return gradient


def _unpool(gradient: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Transpose of 2x2 average pooling; the odd last row or column was never pooled and gets nothing."""
    up = F.interpolate(gradient, scale_factor=2, mode="nearest") / 4
    return F.pad(up, (0, size[1] - up.shape[-1], 0, size[0] - up.shape[-2]))


def kl_gradient(noise: torch.Tensor) -> torch.Tensor:
    """Gradient of var + mean^2 - 1 - log(var), the divergence from N(0, 1), per sample over channels and pixels."""
    dims = (1, 2, 3)
    count = noise[0].numel()
    mean = noise.mean(dims, keepdim=True)
    centred = noise - mean
    variance = centred.square().sum(dims, keepdim=True) / (count - 1)
    return centred * (2 / (count - 1)) * (1 - 1 / (variance + 1e-7)) + 2 * mean / count


def regularize_noise(noise: torch.Tensor, settings: NoiseRegularization, generator: torch.Generator) -> torch.Tensor:
    """`settings.steps` times: `settings.rolls` autocorrelation steps, then one KL step, in fp32.

    `noise`: predicted noise map [B, C, H, W], returned in its dtype. `generator`: on the CPU, so that a seed means the
    same on every device.
    """
    if not settings.is_active:
        return noise
    result = noise.float()
    for _ in range(settings.steps):
        if settings.autocorrelation_weight:
            for _ in range(settings.rolls):
                shifts = draw_shifts(*result.shape[1:], generator)
                rate = settings.autocorrelation_weight / settings.rolls
                result = result - rate * autocorrelation_gradient(result, shifts)
        if settings.kl_weight:
            result = result - settings.kl_weight * kl_gradient(result)
    return result.to(noise.dtype)
