"""DDIM in sigma space against eq. 12 of Song et al. in variance-preserving space, float64."""

import pytest
import torch
from pix2pix_zero.editing.inversion import diffusers_transitions, inversion_transitions
from pix2pix_zero.editing.official import official_transitions
from pix2pix_zero.editing.trajectory import DIFFUSION, ddim_step, predicted_eps
from toy_diffusion import ALPHA_BAR, SIGMA, sigmas, step_in_alpha_bar, timesteps, vp_scale


def normal(seed):
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("t", "t_next"), [(981, 961), (21, 1), (1, 21), (501, 981)])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_step_is_eq_12_in_both_directions_and_for_both_predictions(t, t_next, prediction):
    x, output = normal(0), normal(1)
    here, there = ALPHA_BAR[t], ALPHA_BAR[t_next]
    if prediction == "eps":
        eps, clean = output, (x - (1 - here).sqrt() * output) / here.sqrt()
    else:  # Salimans and Ho 2022, appendix D
        eps = here.sqrt() * output + (1 - here).sqrt() * x
        clean = here.sqrt() * x - (1 - here).sqrt() * output

    sigma, sigma_next = float(SIGMA[t]), float(SIGMA[t_next])
    x_sigma = x * vp_scale(sigma)
    found = predicted_eps(x_sigma, clean, sigma)
    moved = ddim_step(x_sigma, found, sigma, sigma_next)

    torch.testing.assert_close(found, eps, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        moved / vp_scale(sigma_next), step_in_alpha_bar(x, eps, here, there), rtol=1e-10, atol=1e-12
    )


def test_rescaling_keeps_what_the_unet_sees():
    x = normal(2)
    moved = DIFFUSION.rescale(x, 0.3, 7.0)
    torch.testing.assert_close(moved / vp_scale(7.0), x / vp_scale(0.3))
    torch.testing.assert_close(DIFFUSION.rescale(moved, 7.0, 0.3), x)


def test_inversion_visits_the_samplers_levels_in_reverse_and_never_asks_the_unet_about_sigma_zero():
    levels = sigmas(5)
    transitions = inversion_transitions(levels)
    assert [(a, b) for a, _, b in transitions] == list(zip(levels.tolist(), levels.tolist()[1:]))
    assert [model for _, model, _ in transitions] == [levels[1], *levels[1:-1]]


@pytest.mark.parametrize("levels", [[0.1, 0.2], [0.0, 0.2, 0.2], [0.0, 0.3, 0.2], [3.0, 1.0, 0.0]])
def test_levels_that_do_not_ascend_from_zero_are_refused(levels):
    with pytest.raises(ValueError, match="ascend from 0"):
        inversion_transitions(torch.tensor(levels))


def test_diffusers_inversion_is_labelled_with_its_targets_and_starts_at_the_first_entry():
    levels = sigmas(5)
    transitions = diffusers_transitions(levels, SIGMA)
    assert [a for a, _, _ in transitions] == [SIGMA[0], *levels[1:-1]]
    assert [b for _, b, _ in transitions] == [c for _, _, c in transitions] == levels[1:].tolist()


@pytest.mark.parametrize(("steps", "stride"), [(50, 20), (100, 10), (10, 100)])
def test_official_inversion_leaves_out_both_ends_and_reads_levels_one_timestep_early(steps, stride):
    transitions = official_transitions(torch.tensor(timesteps(steps)), SIGMA)
    assert len(transitions) == steps - 2
    visited = range(1 + stride, 1000 - stride, stride)
    assert transitions == [(SIGMA[t - 1], SIGMA[t], SIGMA[t - 1 + stride]) for t in visited]


def test_official_inversion_of_two_steps_is_refused():
    with pytest.raises(ValueError, match="at least 3"):
        official_transitions(torch.tensor(timesteps(2)), SIGMA)
