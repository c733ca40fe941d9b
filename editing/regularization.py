"""Noise regularization: pull a predicted noise map towards white Gaussian noise (pix2pix-zero section 3.1, eq. 3).

The two losses, their pyramid and step sizes follow the paper and the authors' code, with four differences: shifts come
from a seeded generator and are never 0 (a shift of 0 penalizes the variance itself), KL is taken per sample rather than
over the batch, gradients are closed-form, without autograd, and no step goes so far that it could diverge.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .inputs import interruptible

SMALLEST_SIDE = 8


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
    """(height, width) of each scale: halved by 2x2 average pooling until the smaller side is at most 8."""
    sizes = [(height, width)]
    while min(sizes[-1]) > SMALLEST_SIDE:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def draw_shifts(rolls: int, channels: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Shifts uniform in [1, S/2], S the smaller side of a scale of the pyramid: int64 [rolls, channels, scales].

    `size`: (height, width) of the noise map. A side of 1 has no neighbour to correlate with; its shift is 0. The shifts
    are shared by the samples of a batch, so that an image gives the same result alone and in company.
    """
    halves = [min(scale) // 2 for scale in pyramid_sizes(*size)]
    if rolls == 0 or halves == [0]:
        return torch.zeros(rolls, channels, len(halves), dtype=torch.int64)
    draws = [torch.randint(1, half + 1, (channels,), generator=generator) for _ in range(rolls) for half in halves]
    return torch.stack(draws).view(rolls, len(halves), channels).mT


def neighbour_indices(shifts: torch.Tensor, size: tuple[int, int]) -> list[tuple[tuple, ...]]:
    """For each roll and each scale of the pyramid, the index that takes [B, C, H, W] to its neighbours [B, C, 4, H, W].

    `shifts`: of `draw_shifts`, on the noise's device. `size`: (height, width) of the noise map.
    """
    device = shifts.device
    channels = torch.arange(shifts.shape[1], device=device)[:, None, None, None]
    scales = []
    for shift, (height, width) in zip(shifts.unbind(2), pyramid_sizes(*size)):
        stay = torch.zeros_like(shift)
        down = torch.stack([shift, -shift, stay, stay], -1)[..., None, None]
        right = torch.stack([stay, stay, shift, -shift], -1)[..., None, None]
        rows = (torch.arange(height, device=device)[:, None] + down) % height
        columns = (torch.arange(width, device=device) + right) % width
        scales.append([(slice(None), channels, *place) for place in zip(rows, columns)])
    return list(zip(*scales))


def autocorrelation_gradient(noise: torch.Tensor, indices: tuple[tuple, ...]) -> torch.Tensor:
    """Gradient of eq. 3's pairwise loss: the sum over channels, scales and both axes of mean(n * roll(n, shift))^2.

    `noise`: [B, C, H, W] float. `indices`: those of one roll from `neighbour_indices`. Returns [B, C, H, W].
    """
    index, *coarser = indices
    neighbours = noise[index]
    # Each axis is here twice, forwards and backwards, which is the factor 2 of the square's derivative.
    correlation = (noise[:, :, None] * neighbours).sum((-2, -1), keepdim=True)
    gradient = (correlation * neighbours).sum(2) * (2 / noise[0, 0].numel() ** 2)
    if not coarser:
        return gradient
    return gradient + unpooled(autocorrelation_gradient(F.avg_pool2d(noise, 2), coarser), noise.shape[-2:])


def unpooled(gradient: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The gradient behind 2x2 average pooling. An odd last row or column was never pooled and gets 0."""
    gradient = F.interpolate(gradient, scale_factor=2.0, mode="nearest") / 4
    odd = (0, size[1] - gradient.shape[-1], 0, size[0] - gradient.shape[-2])
    return F.pad(gradient, odd) if any(odd) else gradient


def autocorrelation_step(noise: torch.Tensor, indices: tuple[tuple, ...], rate: float) -> torch.Tensor:
    """One step of size `rate` down the `autocorrelation_gradient`, for each channel no further than keeps its length.

    The loss is homogeneous, so that its gradient points along the noise (Euler) and a short step shortens it. One more
    than twice as long as shortens it most would lengthen it, the next one even more: small or strongly correlated maps
    need the bound.
    """
    gradient = autocorrelation_gradient(noise, indices)
    along = (noise * gradient).sum((-2, -1), keepdim=True)
    squared = gradient.square().sum((-2, -1), keepdim=True)
    return noise - (2 * along / squared.clamp_min(1e-30)).clamp(0, rate) * gradient


def kl_step(noise: torch.Tensor, rate: float) -> torch.Tensor:
    """One step of size `rate` down the gradient of var + mean^2 - 1 - log(var), the divergence from N(0, 1), per sample.

    Mean and variance are those of channels and pixels [B, C, H, W]. Neither goes beyond its goal, 0 and 1.
    """
    dims = (1, 2, 3)
    count = noise[0].numel()
    mean = noise.mean(dims, keepdim=True)
    centred = noise - mean
    variance = centred.square().sum(dims, keepdim=True) / (count - 1) + 1e-7
    goal = variance.rsqrt()
    stretch = 1 - (1 - 1 / variance) * (2 * rate / (count - 1))
    stretch = stretch.maximum(goal.clamp_max(1)).minimum(goal.clamp_min(1))
    return mean * (1 - min(2 * rate / count, 1)) + centred * stretch


def regularize_noise(noise: torch.Tensor, settings: NoiseRegularization, generator: torch.Generator) -> torch.Tensor:
    """`settings.steps` times: `settings.rolls` autocorrelation steps, then one KL step, in fp32.

    `noise`: predicted noise map [B, C, H, W], returned in its dtype. `generator`: on the CPU, so that a seed means the
    same on every device. Whatever the weights and the size, the result is finite where `noise` is.
    """
    if not settings.is_active:
        return noise
    size = tuple(noise.shape[-2:])
    rolls = settings.rolls if settings.autocorrelation_weight and min(size) > 1 else 0
    shifts = draw_shifts(settings.steps * rolls, noise.shape[1], size, generator)
    indices = neighbour_indices(shifts.to(noise.device), size)
    result = noise.float()
    for step in range(settings.steps):
        for roll in interruptible(indices[step * rolls : (step + 1) * rolls]):
            result = autocorrelation_step(result, roll, settings.autocorrelation_weight / rolls)
        if settings.kl_weight:
            result = kl_step(result, settings.kl_weight)
    return result.to(noise.dtype)
