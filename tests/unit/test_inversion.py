"""Inversion along the DDIM grid, on analytic models."""

import pytest
import torch
from pix2pix_zero.editing.inversion import (
    FixedPoint,
    aligned_residuals,
    diffusers_transitions,
    inversion_transitions,
    invert,
    invert_fixed_point,
    latent_psnr,
    on_grid,
    reconstruct,
)
from pix2pix_zero.editing.official import official_transitions
from pix2pix_zero.editing.trajectory import FLOW, Inversion, ddim_step, predicted_eps
from toy_diffusion import (
    ALPHA_BAR,
    SIGMA,
    denoiser,
    sigmas,
    step_in_alpha_bar,
    timestep_of,
    timesteps,
    toy_eps,
    vp_scale,
)


def picture():
    return torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def walk(latent, transitions, denoise, regularize=lambda eps: eps):
    return invert(latent, transitions, lambda x, sigma, _: denoise(x, sigma), regularize, lambda *step: None)[0]


def sample(x, levels, denoise):
    """Plain DDIM down the grid."""
    descending = levels.flip(0).tolist()
    for sigma, sigma_next in zip(descending, descending[1:]):
        x = ddim_step(x, predicted_eps(x, denoise(x, sigma), sigma), sigma, sigma_next)
    return x


def transitions_of(method, steps):
    if method == "official":
        return official_transitions(torch.tensor(timesteps(steps)), SIGMA)
    if method == "diffusers":
        return diffusers_transitions(sigmas(steps), SIGMA)
    return inversion_transitions(sigmas(steps))


def test_sampling_undoes_an_inversion_when_the_noise_is_known():
    latent, levels = picture(), sigmas(50)
    noise = torch.randn_like(latent)

    def denoise(x, sigma):
        return x - sigma * noise

    visited = walk(latent, inversion_transitions(levels), denoise)
    torch.testing.assert_close(visited[-1], latent + levels[-1] * noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sample(visited[-1], levels, denoise), latent, rtol=1e-12, atol=1e-12)


def test_inversion_approaches_the_exact_flow_as_steps_grow_and_sampling_returns():
    """Data N(mu, s^2): the exact denoiser is linear and the exact trajectory known in closed form."""
    latent, mu, s = picture(), 0.4, 0.8

    def denoise(x, sigma):
        return (s**2 * x + sigma**2 * mu) / (s**2 + sigma**2)

    errors, round_trips = [], []
    for steps in (50, 100, 200):
        levels = sigmas(steps)
        end = walk(latent, inversion_transitions(levels), denoise)[-1]
        exact = mu + (latent - mu) * (s**2 + levels[-1] ** 2).sqrt() / s
        errors.append(float((end - exact).norm() / exact.norm()))
        round_trips.append(float((sample(end, levels, denoise) - latent).norm() / latent.norm()))
    assert errors[0] < 0.1 and round_trips[0] < 0.1
    for figures in (errors, round_trips):
        assert figures[1] < 0.6 * figures[0] and figures[2] < 0.6 * figures[1], "first order in the step size"


@pytest.mark.parametrize("method", ["ddim", "diffusers"])
def test_every_step_follows_the_method_in_variance_preserving_space(method):
    """Paper: eps(x_t, t). diffusers' DDIMInverseScheduler: the latent of one level, the timestep of the next."""
    steps, latent = 10, picture()
    visited = walk(latent, transitions_of(method, steps), denoiser())

    x = latent
    alpha_bars = [torch.tensor(1.0, dtype=torch.float64), *ALPHA_BAR[timesteps(steps)]]
    labels = timesteps(steps)
    if method == "diffusers":
        alpha_bars[0] = ALPHA_BAR[0]
    else:
        labels = [labels[0], *labels[:-1]]
    for index, (label, here, there) in enumerate(zip(labels, alpha_bars, alpha_bars[1:])):
        x = step_in_alpha_bar(x, toy_eps(x, label), here, there)
        torch.testing.assert_close(visited[index + 1] * there.sqrt(), x, rtol=1e-9, atol=1e-9)


def test_official_inversion_follows_the_authors_scheduler():
    """pix2pixzero ddim_inv.py and scheduler.py: timesteps 21 to 961, from abar[t - 1] to abar[t + 19]."""
    steps, latent = 50, picture()
    transitions = transitions_of("official", steps)
    trajectory = on_grid(walk(latent, transitions, denoiser()), transitions, latent, sigmas(steps))

    x, theirs = latent, [latent] * 3
    for t in range(21, 962, 20):
        x = step_in_alpha_bar(x, toy_eps(x, t), ALPHA_BAR[t - 1], ALPHA_BAR[t + 19])
        theirs.append(x)
    assert len(theirs) == len(trajectory) == 51
    for ours, sigma, expected in zip(trajectory, sigmas(steps).tolist(), theirs):
        torch.testing.assert_close(ours / vp_scale(sigma), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["ddim", "diffusers", "official"])
def test_trajectory_is_on_the_samplers_grid_and_starts_with_the_clean_picture(method):
    steps, latent, levels = 5, picture(), sigmas(5)
    transitions = transitions_of(method, steps)
    visited = walk(latent, transitions, denoiser())
    trajectory = on_grid(visited, transitions, latent, levels)
    assert trajectory.shape == (steps + 1, *latent.shape)
    assert torch.equal(trajectory[0], latent)
    last_level = transitions[-1].sigma_to
    torch.testing.assert_close(trajectory[-1] / vp_scale(float(levels[-1])), visited[-1] / vp_scale(last_level))


def test_the_noise_map_that_is_stepped_along_is_the_regularized_one():
    latent, transitions = picture(), transitions_of("ddim", 4)
    halved = walk(latent, transitions, denoiser(), lambda eps: eps / 2)
    same = walk(latent, transitions, lambda x, sigma: x - (x - denoiser()(x, sigma)) / 2)
    for a, b in zip(halved, same):
        torch.testing.assert_close(a, b)


def test_each_step_is_reported_with_the_estimate_and_the_latent_it_leads_to():
    latent, transitions, reports = picture(), transitions_of("ddim", 3), []
    denoise = denoiser()
    visited, estimates = invert(
        latent, transitions, lambda x, sigma, _: denoise(x, sigma), lambda eps: eps, lambda *step: reports.append(step)
    )
    assert [denoised for _, denoised, _ in reports] == estimates
    assert [index for index, _, _ in reports] == [0, 1, 2]
    for (_, denoised, x), before, after, (_, sigma, _) in zip(reports, visited, visited[1:], transitions):
        assert x is after
        if before is not visited[0]:
            torch.testing.assert_close(denoised, denoiser()(before, sigma))


def test_a_batch_inverts_as_its_pictures_alone():
    latent, transitions = picture(), transitions_of("ddim", 5)
    together = walk(latent, transitions, denoiser())[-1]
    alone = torch.cat([walk(row, transitions, denoiser())[-1] for row in latent.split(1)])
    torch.testing.assert_close(together, alone)


def fixed_point_walk(latent, levels, denoise, iterations, regularize=lambda eps: eps):
    """(latents, estimates at all but the first) of a fixed-point inversion."""
    return invert_fixed_point(
        latent, levels, lambda x, sigma, _: denoise(x, sigma), regularize, lambda *step: None, FixedPoint(iterations)
    )


def test_fixed_point_inversion_solves_the_step_down_in_closed_form_and_sampling_undoes_it():
    """Data N(mu, s^2): eps(x, sigma) = sigma (x - mu) / (s^2 + sigma^2), and the implicit equation is linear in x."""
    latent, levels, mu, s = picture(), sigmas(10), 0.4, 0.8

    def denoise(x, sigma):
        return (s**2 * x + sigma**2 * mu) / (s**2 + sigma**2)

    visited, _ = fixed_point_walk(latent, levels, denoise, 300)
    exact = latent - mu
    for x, before, sigma in zip(visited[1:], levels.tolist(), levels.tolist()[1:]):
        exact = exact / (1 - (sigma - before) * sigma / (s**2 + sigma**2))
        torch.testing.assert_close(x, mu + exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sample(visited[-1], levels, denoise), latent, rtol=1e-9, atol=1e-9)


def test_every_iteration_brings_the_picture_closer():
    latent, levels = picture(), sigmas(10)
    errors = [
        float((sample(fixed_point_walk(latent, levels, denoiser(), n)[0][-1], levels, denoiser()) - latent).norm())
        for n in range(6)
    ]
    assert all(after < 0.8 * before for before, after in zip(errors, errors[1:]))
    assert errors[-1] < 0.05 * errors[0]


def test_fixed_point_inversion_begins_as_plain_inversion_and_goes_on_along_the_noise_to_expect():
    latent, levels = picture(), sigmas(5)
    visited, estimates = fixed_point_walk(latent, levels, denoiser(), 0, lambda eps: eps / 2)
    plain = walk(latent, inversion_transitions(levels), denoiser(), lambda eps: eps / 2)
    for ours, theirs in zip(visited[:3], plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for x, estimate, sigma in zip(visited[1:], estimates, levels.tolist()[1:], strict=True):
        torch.testing.assert_close(estimate, denoiser()(x, sigma))
    angles = levels.atan()
    for i in range(3, 6):
        a, b = (toy_eps(visited[j] / vp_scale(float(levels[j])), timestep_of(float(levels[j]))) for j in (i - 2, i - 1))
        line = a + (b - a) * (angles[i] - angles[i - 2]) / (angles[i - 1] - angles[i - 2])
        torch.testing.assert_close(visited[i], visited[i - 1] + (levels[i] - levels[i - 1]) * line / 2)


def test_the_noise_to_expect_saves_most_of_the_error_without_another_evaluation():
    """On data N(mu, s^2), with the exact denoiser."""
    latent, levels, mu, s, calls = picture(), sigmas(15), 0.4, 0.8, 0

    def denoise(x, sigma):
        nonlocal calls
        calls += 1
        return (s**2 * x + sigma**2 * mu) / (s**2 + sigma**2)

    plain, ahead = walk(latent, transitions_of("ddim", 15), denoise), fixed_point_walk(latent, levels, denoise, 0)[0]
    assert calls == 15 + 16
    errors = [float((sample(visited[-1], levels, denoise) - latent).norm()) for visited in (plain, ahead)]
    assert errors[1] < 0.3 * errors[0]


def test_a_picture_that_iterations_would_lead_astray_stays_where_it_came_closest():
    """eps = x^3: small pictures are drawn to the solution, large ones thrown from it. Neither disturbs the other."""
    levels = torch.tensor([0.0, 0.2, 0.5], dtype=torch.float64)

    def denoise(x, sigma):
        return x - sigma * x**3

    def unsolved(visited):
        pairs = zip(visited, visited[1:], levels.tolist(), levels.tolist()[1:])
        return [(before + (b - a) * x**3 - x).norm() for before, x, a, b in pairs]

    tame, wild = picture()[:1] / 10, picture()[1:] * 2
    together, _ = fixed_point_walk(torch.cat([tame, wild]), levels, denoise, 20)
    for row, alone in enumerate((tame, wild)):
        visited, estimates = fixed_point_walk(alone, levels, denoise, 20)
        for ours, batched in zip(visited, together):
            assert torch.equal(ours[0], batched[row])
        torch.testing.assert_close(estimates[-1], denoise(visited[-1], 0.5))
        guesses, _ = fixed_point_walk(alone, levels, denoise, 0)
        assert unsolved(visited)[0] <= unsolved(guesses)[0]
        assert (max(unsolved(visited)) < 1e-6) == (row == 0)


def test_fixed_point_inversion_tells_which_evaluations_are_at_latents_that_stay():
    latent, levels, calls = picture(), sigmas(3), []

    def denoise(x, sigma, level):
        calls.append((level, x))
        return denoiser()(x, sigma)

    visited, _ = invert_fixed_point(latent, levels, denoise, lambda eps: eps, lambda *step: None, FixedPoint(2))
    assert [level for level, _ in calls] == [0, 0, 0, 1, 0, 0, 2, 0, 0, 3]
    for level, x in calls:
        if level:
            assert torch.equal(x, visited[level])


def test_reconstruction_is_ddim_down_to_the_picture_in_variance_preserving_space():
    steps, noise = 10, picture()
    ours = reconstruct(noise, sigmas(steps), denoiser())
    x = noise / vp_scale(float(sigmas(steps)[-1]))
    alpha_bars = [torch.tensor(1.0, dtype=torch.float64), *ALPHA_BAR[timesteps(steps)]]
    for t, here, there in reversed(list(zip(timesteps(steps), alpha_bars[1:], alpha_bars))):
        x = step_in_alpha_bar(x, toy_eps(x, t), here, there)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_the_error_of_a_reconstruction_is_told_per_picture_against_its_own_range():
    """PSNR = 10 log10(peak^2 / MSE)."""
    clean = torch.zeros(2, 4, 6, 5)
    clean[0, 0, 0, 0], clean[1, 0, 0, 0] = 4.0, -8.0
    again = clean + torch.tensor([0.04, 0.008]).view(2, 1, 1, 1)
    torch.testing.assert_close(latent_psnr(again, clean), torch.tensor([40.0, 60.0]), atol=1e-3, rtol=0)
    assert latent_psnr(clean, clean).isfinite().all()
    flat = torch.zeros(1, 4, 8, 8)  # as Empty Latent Image gives it
    torch.testing.assert_close(latent_psnr(flat + 0.1, flat), torch.tensor([20.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_aligned_inversion_next_to_no_noise_comes_back_from_half_precision(dtype):
    levels, latent = torch.tensor([0.0, 0.00565, 0.79, 0.938, 0.97]), picture().float()

    def denoise(x, sigma, level=0):
        return x - sigma * torch.sin(x) * (1 + sigma)

    transitions = inversion_transitions(levels)
    visited, estimates = invert(latent, transitions, denoise, lambda noise: noise, lambda *step: None, FLOW)
    trajectory = on_grid(visited, transitions, latent, levels, FLOW, dtype)
    residuals = aligned_residuals(trajectory, levels, visited, estimates[1:], FLOW)
    inversion = Inversion(trajectory, levels, source=[], model=None, path=FLOW, aligned=True)
    grid, x = levels.tolist(), inversion.latent(-1)
    for level in range(inversion.steps, 0, -1):
        told, seen = grid[inversion.seen_level(level)], inversion.seen_from(x, level)
        x = FLOW.step_by(x, seen, denoise(seen, told), (told, grid[level], grid[level - 1]))
        x = x + residuals[level - 1].float()
    assert (x - latent).abs().max() <= {torch.float32: 1e-4, torch.float16: 2e-2}[dtype]
