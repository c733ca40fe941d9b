"""How far a noise map is from white Gaussian noise: what the regularization of pix2pix-zero section 3.1 acts on.

Each statistic comes with the spread that true noise of the same size shows, so that a reader can tell chance from fault.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .regularization import pyramid_sizes

RANGE = 4.0
"""The histogram covers -RANGE..RANGE, in units of true noise's standard deviation."""


@dataclass(frozen=True)
class NoiseStatistics:
    """Of one noise map [C, H, W].

    `mean`, `variance`: [C]. `kl`: see `divergence`. `density`: [bins]. `autocorrelation`: per scale of the pyramid
    [shifts]. `spectrum`: [rings]. See `value_density` and the functions of the other names.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    kl: float
    density: torch.Tensor
    autocorrelation: list[torch.Tensor]
    spectrum: torch.Tensor


def noise_statistics(noise: torch.Tensor) -> NoiseStatistics:
    """The statistics of a noise map [C, H, W], in fp64 on its device."""
    noise = noise.double()
    return NoiseStatistics(
        mean=noise.mean((1, 2)),
        variance=noise.var((1, 2), correction=0),
        kl=divergence(noise),
        density=value_density(noise),
        autocorrelation=autocorrelation(noise),
        spectrum=power_spectrum(noise),
    )


def divergence(noise: torch.Tensor) -> float:
    """KL divergence of N(mean, variance), over all values, from N(0, 1) in nats. Eq. 3's loss is twice it."""
    mean, variance = noise.mean(), noise.var(correction=0).clamp(min=1e-12)
    return float((variance + mean.square() - 1 - variance.log()) / 2)


def bin_count(values: int) -> int:
    """Bins for a histogram of so many values, by Rice's rule: 9 to 65, an odd number so that one is centred on 0."""
    return min(max(round(2 * values ** (1 / 3)), 8), 64) // 2 * 2 + 1


def bin_centres(bins: int) -> torch.Tensor:
    """Middles of so many bins over -RANGE..RANGE: [bins] fp64."""
    return (torch.arange(bins, dtype=torch.float64) + 0.5) * (2 * RANGE / bins) - RANGE


def value_density(noise: torch.Tensor) -> torch.Tensor:
    """Share of the values per unit in each bin over -RANGE..RANGE: [bins]. Values beyond are in none."""
    bins = bin_count(noise.numel())
    return torch.histc(noise, bins, -RANGE, RANGE) * (bins / (2 * RANGE) / noise.numel())


def density_spread(values: int) -> torch.Tensor:
    """Standard deviation of `value_density` for so many values of true noise: [bins]."""
    bins = bin_count(values)
    width = 2 * RANGE / bins
    share = normal_density(bin_centres(bins)) * width
    return (share * (1 - share) / values).sqrt() / width


def normal_density(values: torch.Tensor) -> torch.Tensor:
    """The density of N(0, 1)."""
    return torch.exp(-values.square() / 2) / (2 * torch.pi) ** 0.5


def autocorrelation(noise: torch.Tensor) -> list[torch.Tensor]:
    """Per scale of the regularization's pyramid, the correlation with itself shifted by 1 to S/2 pixels: [S // 2] each.

    The mean of n * roll(n, shift) over channels, pixels and both axes, as a share of the mean of n * n: 1 for a constant,
    about 0 for white noise. `noise`: [C, H, W]; S is the smaller side of the scale.
    """
    scales = []
    for height, width in pyramid_sizes(*noise.shape[-2:]):
        # Wiener-Khinchin: the circular autocorrelation is the Fourier transform of the power.
        power = torch.fft.fft2(noise).abs().square().mean(0)
        products = torch.fft.ifft2(power).real
        shifts = range(1, min(height, width) // 2 + 1)
        both = (
            torch.stack([(products[shift, 0] + products[0, shift]) / 2 for shift in shifts]) if shifts else power[:0, 0]
        )
        scales.append(both / products[0, 0].clamp(min=1e-12))
        noise = F.avg_pool2d(noise, 2) if min(height, width) > 1 else noise
    return scales


def autocorrelation_spread(channels: int, height: int, width: int) -> list[torch.Tensor]:
    """Standard deviation of `autocorrelation` for white noise, of the same shapes."""
    scales = []
    for scale_height, scale_width in pyramid_sizes(height, width):
        shifts = torch.arange(1, min(scale_height, scale_width) // 2 + 1)
        # Shifted by half of a side, every product of two pixels counts twice.
        twice = sum((2 * shifts == side).double() for side in (scale_height, scale_width)) / 2
        scales.append(((1 + twice) / (2 * channels * scale_height * scale_width)).sqrt())
    return scales


def power_spectrum(noise: torch.Tensor) -> torch.Tensor:
    """Mean power in rings of equal frequency, 1 everywhere for white noise of variance 1: [S // 2].

    `noise`: [C, H, W]; S is its smaller side. Ring k holds the frequencies of k / S cycles per pixel, to the nearest.
    """
    power = torch.fft.fft2(noise, norm="ortho").abs().square().mean(0)
    rings = _rings(*noise.shape[-2:]).to(noise.device)
    return torch.stack(
        [power[rings == ring].mean() for ring in range(1, min(noise.shape[-2:]) // 2 + 1)] or [power[0, 0]]
    )


def power_spread(channels: int, height: int, width: int) -> torch.Tensor:
    """Standard deviation of `power_spectrum` for white noise of variance 1, of the same shape."""
    rings = _rings(height, width)
    modes = torch.stack(
        [(rings == ring).sum() for ring in range(1, min(height, width) // 2 + 1)] or [rings.new_ones(())]
    )
    return (2 / (channels * modes.double())).sqrt()  # a mode and its mirror image are one


def _rings(height: int, width: int) -> torch.Tensor:
    """The ring that each frequency belongs to: int64 [height, width]."""
    down, right = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    return ((down[:, None] ** 2 + right**2).sqrt() * min(height, width)).round().long()
