"""What the noise report says, against NumPy, closed forms and true noise drawn many times."""

import numpy as np
import pytest
import torch
from pix2pix_zero.editing import noise_statistics as statistics
from pix2pix_zero.editing.noise_statistics import noise_statistics

SHAPE = (3, 16, 20)


def noise(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_are_those_of_each_channel():
    map_ = noise() * torch.tensor([1.0, 2.0, 0.5])[:, None, None] + 0.3
    measured = noise_statistics(map_)
    np.testing.assert_allclose(measured.mean, map_.numpy().mean((1, 2)))
    np.testing.assert_allclose(measured.variance, map_.numpy().var((1, 2)))


def test_divergence_is_that_of_two_normal_distributions():
    map_ = 1.7 * noise() - 0.4
    own = torch.distributions.Normal(map_.mean(), map_.std(correction=0))
    expected = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0))
    assert statistics.divergence(map_) == pytest.approx(float(expected))


def test_density_is_a_histogram_whose_area_is_the_share_of_the_values_in_range():
    map_ = 1.5 * noise()
    density = statistics.value_density(map_)
    inside = map_.numpy()[np.abs(map_.numpy()) <= statistics.RANGE]
    counts, edges = np.histogram(inside, len(density), (-statistics.RANGE, statistics.RANGE))
    np.testing.assert_allclose(density, counts / map_.numel() / np.diff(edges))
    np.testing.assert_allclose(statistics.bin_centres(len(density)), (edges[1:] + edges[:-1]) / 2, atol=1e-12)
    assert len(inside) < map_.numel(), "or nothing lies beyond"


def test_autocorrelation_is_the_mean_product_with_the_rolled_map_at_every_scale():
    map_ = noise().numpy()
    scales = statistics.autocorrelation(torch.from_numpy(map_))
    assert [len(scale) for scale in scales] == [8, 4]
    for scale in scales:
        for shift, value in enumerate(scale.tolist(), 1):
            products = [(map_ * np.roll(map_, shift, axis)).mean() for axis in (1, 2)]
            assert value == pytest.approx(np.mean(products) / (map_**2).mean(), abs=1e-12)
        channels, height, width = map_.shape
        map_ = map_.reshape(channels, height // 2, 2, width // 2, 2).mean((2, 4))


@pytest.mark.parametrize("waves", [4, 10])
def test_the_power_of_a_wave_is_in_the_ring_of_its_frequency(waves):
    across = torch.arange(32, dtype=torch.float64)
    map_ = (2 * torch.pi * waves * across / 32).cos().expand(2, 16, 32)
    spectrum = statistics.power_spectrum(map_)
    ring = 16 * waves // 32
    assert spectrum[ring - 1] > 1
    spectrum[ring - 1] = 0
    assert spectrum.abs().max() < 1e-20


def test_spectrum_is_the_mean_power_of_numpys_transform_ring_by_ring():
    map_ = noise().numpy()
    power = (np.abs(np.fft.fft2(map_)) ** 2).mean(0) / map_[0].size
    down, right = np.meshgrid(np.fft.fftfreq(16), np.fft.fftfreq(20), indexing="ij")
    radius = 16 * np.hypot(down, right)
    spectrum = statistics.power_spectrum(torch.from_numpy(map_))
    for ring, value in enumerate(spectrum.tolist(), 1):
        assert value == pytest.approx(power[(radius >= ring - 0.5) & (radius < ring + 0.5)].mean())


def test_the_spreads_are_those_of_true_noise():
    """Standard deviations over 600 draws lie within 15% (5 of their own) of the announced ones."""
    draws = [noise(seed) for seed in range(600)]
    measured = [noise_statistics(draw) for draw in draws]
    spectrum = torch.stack([each.spectrum for each in measured])
    torch.testing.assert_close(spectrum.std(0), statistics.power_spread(*SHAPE), rtol=0.15, atol=0)
    torch.testing.assert_close(spectrum.mean(0), torch.ones(8, dtype=torch.float64), rtol=0.05, atol=0)
    density = torch.stack([each.density for each in measured])
    announced = statistics.density_spread(draws[0].numel())
    common = slice(len(announced) // 4, -(len(announced) // 4))  # where bins hold more than a value or two
    torch.testing.assert_close(density.std(0)[common], announced[common], rtol=0.15, atol=0)
    for number, announced in enumerate(statistics.autocorrelation_spread(*SHAPE)):
        found = torch.stack([each.autocorrelation[number] for each in measured])
        torch.testing.assert_close(found.std(0), announced, rtol=0.15, atol=0)


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 2, 4), (4, 7, 9), (4, 1, 12)])
def test_small_and_odd_maps_have_statistics_of_the_announced_shapes(shape):
    measured = noise_statistics(noise(shape=shape))
    assert measured.spectrum.shape == statistics.power_spread(*shape).shape
    assert measured.density.shape == statistics.density_spread(np.prod(shape)).shape
    spreads = statistics.autocorrelation_spread(*shape)
    assert [scale.shape for scale in measured.autocorrelation] == [spread.shape for spread in spreads]
    assert all(scale.isfinite().all() for scale in measured.autocorrelation)
