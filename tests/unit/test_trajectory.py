"""The source between the levels of its grid, and beyond them."""

import weakref

import pytest
import torch
from pix2pix_zero.editing.trajectory import DIFFUSION, FLOW, Inversion, ddim_step, predicted_eps
from toy_diffusion import denoiser, sigmas


@pytest.fixture
def source():
    """A trajectory that DDIM walks down exactly."""
    levels = sigmas(4)
    x = 15.0 * torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    visited = [x]
    for sigma, sigma_next in zip(levels.tolist()[::-1], levels.tolist()[-2::-1]):
        x = ddim_step(x, predicted_eps(x, denoiser()(x, sigma), sigma), sigma, sigma_next)
        visited.append(x)
    return Inversion(torch.stack(visited[::-1]), levels, [], weakref.ref(torch.nn.Module))


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_noise_to_picture_is_the_noise_level_in_sigma_space(sigma):
    assert DIFFUSION.noise_to_picture(sigma) == sigma
    assert FLOW.noise_to_picture(sigma / (1 + sigma)) == pytest.approx(sigma)


def test_noise_to_picture_changes_little_next_to_pure_noise():
    """So that a difference of estimates may be taken from there to the next level."""
    assert FLOW.noise_to_picture(0.97) / FLOW.noise_to_picture(1.0) == pytest.approx(0.97)


def test_at_its_levels_it_is_the_trajectory(source):
    for level, sigma in enumerate(source.sigmas.tolist()):
        assert source.place_of(sigma) == level
        torch.testing.assert_close(source.latent_at(sigma), source.trajectory[level])
    for level, sigma in enumerate(source.sigmas.tolist()[1:], 1):
        torch.testing.assert_close(source.estimate_at(sigma), denoiser()(source.trajectory[level], sigma))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_between_two_levels_it_is_where_a_shorter_step_ends(source, share):
    for level in range(1, source.steps + 1):
        low, high = source.sigmas[level - 1 : level + 1].tolist()
        sigma = low + share * (high - low)
        x = source.trajectory[level]
        stepped = ddim_step(x, predicted_eps(x, denoiser()(x, high), high), high, sigma)
        torch.testing.assert_close(source.latent_at(sigma), stepped)
        assert source.place_of(sigma) == pytest.approx(level - 1 + share)
        # From there on, DDIM along the estimate ends where it would have.
        estimate = source.estimate_at(sigma)
        onwards = ddim_step(stepped, predicted_eps(stepped, estimate, sigma), sigma, low)
        torch.testing.assert_close(onwards, source.trajectory[level - 1])


def test_above_the_grid_the_last_step_goes_on(source):
    low, high = source.sigmas[-2:].tolist()
    sigma = high + 0.5 * (high - low)
    beyond = source.trajectory[-1] + 0.5 * (source.trajectory[-1] - source.trajectory[-2])
    torch.testing.assert_close(source.latent_at(sigma), beyond)
    torch.testing.assert_close(source.estimate_at(sigma), source.estimate_at(high))
    assert source.place_of(sigma) == pytest.approx(source.steps + 0.5)
