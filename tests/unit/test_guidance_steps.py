"""How large a step of guidance is, and at which steps it is taken."""

import math

import pytest
import torch
from guidance_toy import STEPS, ToyPasses, inversion, run, their_distance
from pix2pix_zero.editing.guidance import (
    GuidanceSchedule,
    attention_distance,
    distance_step,
    plain_step,
    sample_guided,
)
from pix2pix_zero.editing.official import sample_official
from toy_diffusion import sigmas, vp_scale


def test_distance_is_the_authors_loss_per_picture():
    generator = torch.Generator().manual_seed(0)
    maps, reference = (torch.randn(3, 8, 16, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    theirs = torch.stack([their_distance(a, b) for a, b in zip(maps, reference)])
    torch.testing.assert_close(attention_distance(maps, reference), theirs)


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_the_papers_step_is_a_gradient_step_on_what_the_unet_sees(sigma):
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    strength = 0.1

    def loss(seen):
        return (torch.sin(seen) ** 2).sum()

    seen = (x / vp_scale(sigma)).detach().requires_grad_(True)
    stepped = seen - strength * torch.autograd.grad(loss(seen), seen)[0]
    (gradient,) = torch.autograd.grad(loss(x / vp_scale(sigma)), x)
    ours = x + plain_step(gradient, sigma, strength)
    torch.testing.assert_close(ours / vp_scale(sigma), stepped)


def slopes_at(x):
    """A distance per picture that is linear in the latent, and its gradient there."""
    slopes = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    return slopes, (slopes * x).sum((1, 2, 3)) + 50.0


@pytest.mark.parametrize("part", [0.1, 0.5, 1.0])
def test_a_step_closes_its_part_of_a_distance_that_is_linear(part):
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient, before = slopes_at(x)
    _, after = slopes_at(x + distance_step(gradient, before, part, longest=1e9))
    torch.testing.assert_close(after, (1 - part) * before)


@pytest.mark.parametrize("factor", [1e-6, 70 / 16, 1e6])
def test_a_step_is_the_same_whatever_factor_the_distance_has(factor):
    """Of 70 sites in place of 16, of more words or pixels."""
    gradient, distance = slopes_at(torch.randn(2, 4, 5, 6, dtype=torch.float64))
    shift = distance_step(gradient, distance, 0.3, longest=1e9)
    torch.testing.assert_close(distance_step(factor * gradient, factor * distance, 0.3, longest=1e9), shift)


@pytest.mark.parametrize("sigma", [0.03, 14.6])
def test_a_step_is_the_same_in_whatever_units_the_latent_is(sigma):
    scale = vp_scale(sigma)
    gradient, distance = slopes_at(torch.randn(2, 4, 5, 6, dtype=torch.float64))
    shift = distance_step(gradient, distance, 0.3, longest=1e9)
    torch.testing.assert_close(distance_step(gradient / scale, distance, 0.3, longest=1e9), scale * shift)


def test_a_step_is_bounded_where_the_gradient_vanishes_and_the_distance_does_not():
    gradient, distance = torch.zeros(3, 4, 5, 6), torch.full((3,), 7.0)
    gradient[1:] = 1e-30 * torch.randn(2, 4, 5, 6)
    shift = distance_step(gradient, distance, 0.5, longest=0.2)
    assert not shift[0].any() and shift.isfinite().all()
    torch.testing.assert_close(shift[1:].square().mean((1, 2, 3)).sqrt(), torch.full((2,), 0.5 * 0.2))


@pytest.mark.parametrize("loop", [sample_guided, sample_official])
def test_strength_zero_never_asks_for_maps(loop):
    passes = ToyPasses()
    run(loop, inversion(), passes, strength=0.0)
    assert {call for call, _, _ in passes.calls} == {"denoise"}
    assert len(passes.calls) == 2 * STEPS, "no more UNet calls than plain sampling"


def test_strength_zero_is_plain_ddim():
    source = inversion()
    x = source.trajectory[-1]
    levels = source.sigmas.flip(0).tolist()
    for sigma, sigma_next in zip(levels, levels[1:]):
        denoised = ToyPasses().denoise(x, sigma)
        x = denoised + (x - denoised) * (sigma_next / sigma)
    torch.testing.assert_close(run(sample_guided, source, ToyPasses(), strength=0.0), x)


@pytest.mark.parametrize("loop", [sample_guided, sample_official])
def test_guidance_acts_on_the_levels_of_its_window_only(loop):
    passes, levels = ToyPasses(), sigmas(STEPS).tolist()
    run(loop, inversion(), passes, first=levels[4], last=levels[3])
    for kind in ("record", "gradient"):
        assert sorted({sigma for call, _, sigma in passes.calls if call == kind}) == levels[3:5]


@pytest.mark.parametrize("loop", [sample_guided, sample_official])
def test_a_window_without_levels_is_strength_zero(loop):
    torch.testing.assert_close(
        run(loop, inversion(), ToyPasses(), first=1e-9), run(loop, inversion(), ToyPasses(), strength=0.0)
    )


def test_a_strength_leaves_as_much_of_the_distance_for_any_number_of_steps():
    left = {}
    for steps in (5, 10, 50):
        schedule = GuidanceSchedule(0.05)
        left[steps] = math.prod(1 - schedule.strength_at(1.0, step, steps) for step in range(steps))
    assert left == pytest.approx(dict.fromkeys(left, 0.95**50))
    assert GuidanceSchedule(0.05).strength_at(1.0, 0, 50) == pytest.approx(0.05)
    assert GuidanceSchedule(1.0).strength_at(1.0, 0, 5) == 1.0


def test_a_gradient_step_means_the_same_for_any_number_of_steps():
    """Where gradients do not change, the shifts add up to the same: the number of steps is no second knob."""

    class Constant(ToyPasses):
        def denoise(self, x, sigma, hold_negative=False):
            return x  # no noise is seen, so that each DDIM step keeps the latent, and with it the shifts

        def map_gradient(self, branch, x, sigma, reference):
            return torch.ones_like(x) / (1 + sigma**2), x.new_zeros(len(x))

    for steps in (5, 10, 20):
        source = inversion(steps=steps)
        moved = run(sample_guided, source, Constant(), 0.3, plain=True) - source.trajectory[-1]
        torch.testing.assert_close(moved, torch.full_like(moved, -0.3 * 50))


def test_guidance_of_every_third_step_has_the_same_total_strength():
    for plain, total in ((True, sum), (False, lambda strengths: math.prod(1 - strength for strength in strengths))):
        each, third = (
            [GuidanceSchedule(0.1, plain, every=every).strength_at(1.0, step, 9) for step in range(9)]
            for every in (1, 3)
        )
        assert [strength > 0 for strength in third] == [False, True, False] * 3
        assert total(third) == pytest.approx(total(each))


def test_guidance_acts_on_the_noisiest_share_of_the_steps():
    schedule = GuidanceSchedule(0.1, share=0.8)
    assert [schedule.strength_at(1.0, step, 10) > 0 for step in range(10)] == [True] * 8 + [False] * 2


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_even_one_step_is_guided(every):
    assert GuidanceSchedule(0.1, every=every).strength_at(1.0, 0, 1) > 0


@pytest.mark.parametrize("loop", [sample_guided, sample_official])
def test_no_maps_are_asked_for_where_guidance_pauses(loop):
    passes, levels = ToyPasses(), sigmas(STEPS).tolist()
    run(loop, inversion(), passes, every=2)
    for kind in ("record", "gradient"):
        assert sorted({sigma for call, _, sigma in passes.calls if call == kind}) == levels[2:6:2]
