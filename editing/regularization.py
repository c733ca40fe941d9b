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
    """Shifts of one roll, uniform in [1, S/2] with S the smaller side of the level: int64 [channels, levels].

    A level with a side of 1 has no neighbour to correlate with; its shift is 0 and the loss skips it. The shifts are
    shared by the samples of a batch, so that an image gives the same result alone and in company.
    """
    return draw_rolls(1, channels, height, width, generator)[0]


def draw_rolls(rolls: int, channels: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """The shifts of `rolls` successive calls of `draw_shifts` at once: int64 [rolls, channels, levels]."""
    halves = [min(size) // 2 for size in pyramid_sizes(height, width)]
    if halves == [0]:
        return torch.zeros(rolls, channels, 1, dtype=torch.int64)
    draws = [torch.randint(1, half + 1, (channels,), generator=generator) for _ in range(rolls) for half in halves]
    return torch.stack(draws).view(rolls, len(halves), channels).mT


def autocorrelation_gradient(noise: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Gradient of eq. 3's pairwise loss: the sum over channels, levels and both axes of mean(n * roll(n, shift))^2.

    `noise`: [B, C, H, W] float; `shifts`: int64 [C, levels] from `draw_shifts`. Returns [B, C, H, W].
    """
    if min(noise.shape[-2:]) == 1:
        return torch.zeros_like(noise)
    loss = _AutocorrelationLoss(noise, shifts[None])
    return loss.scale * loss.gradient(noise.flatten(0, 1)[:, None], roll=0).view_as(noise)


class _AutocorrelationLoss:
    """Eq. 3's pairwise loss for successive rolls, over channel planes [B * C, 1, H, W].

    All shifts are known before the first roll, so the places of all neighbours go to the device once.
    """

    def __init__(self, noise: torch.Tensor, shifts: torch.Tensor):
        """`noise`: [B, C, H, W], read for its shape, dtype and device; `shifts`: int64 [rolls, C, levels]."""
        sizes = pyramid_sizes(*noise.shape[-2:])
        self.levels = [_Level(noise, *size) for size in sizes]
        self.scale = self.levels[0].scale
        starts = [_row_starts(shift, len(noise), *size) for shift, size in zip(shifts.unbind(2), sizes)]
        counts = [start.shape[1] for start in starts]
        starts = torch.cat(starts, 1).to(noise.device, non_blocking=noise.is_cuda)
        self.starts = list(zip(*(part.unbind(0) for part in starts.split(counts, 1))))

    def gradient(self, planes: torch.Tensor, roll: int) -> torch.Tensor:
        """The loss's gradient at `planes`, divided by `scale`."""
        pyramid = [planes]
        for _ in self.levels[1:]:
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        gradient = coarser = None
        for noise, level, starts in reversed(list(zip(pyramid, self.levels, self.starts[roll]))):
            own = level.gradient(noise, starts)
            if coarser:
                own = torch.add(own, level.unpool(gradient), alpha=coarser.scale / level.scale / 4)
            gradient, coarser = own, level
        return gradient.view_as(planes)


class _Level:
    """One level of the pyramid, [B * C, 1, H, W], with the memory that all rolls share."""

    def __init__(self, noise: torch.Tensor, height: int, width: int):
        planes = noise.shape[0] * noise.shape[1]
        # 1 / (H W) of the mean, and 2 / (H W) of the derivative of its square, are left to the step size.
        self.scale = 2 / (height * width) ** 2
        # Two copies side by side: rolled along x, a row is W successive elements, read without index arithmetic.
        self.doubled = noise.new_empty(planes, 1, height, 2 * width)
        self.stretches = self.doubled.view(-1).unfold(0, width, 1)
        self.rows = noise.new_empty(planes * 4 * height, width)
        self.neighbours = self.rows.view(planes, 4, height, width)
        self.product = torch.empty_like(self.neighbours)
        self.flat_product = self.product.view(planes, 4, height * width)
        half_height, half_width = height // 2, width // 2
        pooled = torch.arange(half_height * half_width, device=noise.device).view(half_height, 1, half_width, 1)
        parents = pooled.expand(-1, 2, -1, 2).reshape(2 * half_height, 2 * half_width)
        self.odd = (0, width % 2, 0, height % 2)
        self.parents = F.pad(parents, self.odd, value=half_height * half_width).view(-1)

    def gradient(self, noise: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Gradient of the level's own loss, divided by `scale`: [B * C, H * W].

        The sum of sum(n * neighbour) * neighbour over the four neighbours, two along each axis. `starts`: the level's
        `_row_starts` for the roll.
        """
        torch.cat((noise, noise), -1, out=self.doubled)
        torch.index_select(self.stretches, 0, starts, out=self.rows)
        correlation = torch.mul(noise, self.neighbours, out=self.product).sum((-2, -1), keepdim=True)
        torch.mul(self.neighbours, correlation, out=self.product)
        return self.flat_product.sum(1)

    def unpool(self, gradient: torch.Tensor) -> torch.Tensor:
        """Each pooled value at its 2x2 pixels; the odd last row or column was never pooled and gets 0."""
        if any(self.odd):
            gradient = F.pad(gradient, (0, 1))
        return gradient.index_select(1, self.parents)


def _row_starts(shift: torch.Tensor, batch: int, height: int, width: int) -> torch.Tensor:
    """Where the rows of a level's four neighbours start: int64 [rolls, B * C * 4 * H]. `shift`: int64 [rolls, C].

    They count the elements of `_Level.doubled`.
    """
    shift = shift[:, None, :, None, None]
    down, right = (shift * torch.tensor(signs)[:, None] for signs in ((1, -1, 0, 0), (0, 0, 1, -1)))
    planes = torch.arange(batch * shift.shape[2]).view(batch, -1, 1, 1)
    rows = planes * height + (torch.arange(height) + down) % height
    return (rows * (2 * width) + right % width).flatten(1)


def kl_gradient(noise: torch.Tensor) -> torch.Tensor:
    """Gradient of var + mean^2 - 1 - log(var), the divergence from N(0, 1), per sample over channels and pixels."""
    dims = (1, 2, 3)
    count = noise[0].numel()
    mean = noise.mean(dims, keepdim=True)
    centred = noise - mean
    variance = centred.square().sum(dims, keepdim=True) / (count - 1)
    slope = (1 - 1 / (variance + 1e-7)) * (2 / (count - 1))
    return torch.addcmul(mean * (2 / count), centred, slope)


def regularize_noise(noise: torch.Tensor, settings: NoiseRegularization, generator: torch.Generator) -> torch.Tensor:
    """`settings.steps` times: `settings.rolls` autocorrelation steps, then one KL step, in fp32.

    `noise`: predicted noise map [B, C, H, W], returned in its dtype. `generator`: on the CPU, so that a seed means the
    same on every device.
    """
    if not settings.is_active:
        return noise
    result = noise.float()
    rolls = settings.rolls if settings.autocorrelation_weight and min(noise.shape[-2:]) > 1 else 0
    if rolls:
        loss = _AutocorrelationLoss(result, draw_rolls(settings.steps * rolls, *result.shape[1:], generator))
        rate = settings.autocorrelation_weight / rolls * loss.scale
    for step in range(settings.steps):
        planes = result.flatten(0, 1)[:, None]
        for roll in range(step * rolls, (step + 1) * rolls):
            planes = torch.sub(planes, loss.gradient(planes, roll), alpha=rate)
        result = planes.view_as(noise)
        if settings.kl_weight:
            result = torch.sub(result, kl_gradient(result), alpha=settings.kl_weight)
    return result.to(noise.dtype)
