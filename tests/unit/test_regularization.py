"""Noise regularization against the paper's losses, restated loop by loop in float64 and differentiated by autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from pix2pix_zero.editing.regularization import (
    NoiseRegularization,
    autocorrelation_gradient,
    draw_shifts,
    kl_step,
    neighbour_indices,
    pyramid_sizes,
    regularize_noise,
)
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = [(64, 64), (24, 40), (40, 24), (17, 33), (9, 64), (8, 8), (5, 7), (3, 20), (2, 2), (1, 12), (12, 1), (1, 1)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_map(batch=1, channels=4, height=16, width=16, seed=0, dtype=torch.float64):
    return torch.randn(batch, channels, height, width, generator=generator(seed), dtype=torch.float64).to(dtype)


def correlated_noise(batch=1, size=64, seed=0):
    """White noise plus a smooth pattern, of variance above 1 and mean above 0: what a UNet predicts for a picture."""
    pattern = F.interpolate(noise_map(batch, 4, size // 8, size // 8, seed + 1), scale_factor=8, mode="bilinear")
    return noise_map(batch, 4, size, size, seed) * 0.9 + 0.7 * pattern + 0.05


def autocorrelation_loss(noise, shifts):
    loss = noise.new_zeros(())
    for sample in noise:
        for channel, rolls in zip(sample, shifts.tolist()):
            for scale, shift in enumerate(rolls):
                if scale:
                    channel = F.avg_pool2d(channel[None, None], 2)[0, 0]
                if min(channel.shape) > 1:
                    for axis in (0, 1):
                        loss = loss + (channel * torch.roll(channel, shift, axis)).mean() ** 2
    return loss


def kl_loss(noise):
    loss = noise.new_zeros(())
    for sample in noise:
        loss = loss + sample.var() + sample.mean() ** 2 - 1 - torch.log(sample.var() + 1e-7)
    return loss


def differentiate(loss, noise, *args):
    noise = noise.double().clone().requires_grad_(True)
    return torch.autograd.grad(loss(noise, *args), noise)[0]


def regularize_by_autograd(noise, settings, seed):
    draws = generator(seed)
    for _ in range(settings.steps):
        for _ in range(settings.rolls):
            (shifts,) = draw_shifts(1, noise.shape[1], noise.shape[2:], draws)
            noise = noise - settings.autocorrelation_weight / settings.rolls * differentiate(
                autocorrelation_loss, noise, shifts
            )
        noise = noise - settings.kl_weight * differentiate(kl_loss, noise)
    return noise


def regularize_by_rolls(noise, settings, seed):
    """The gradients of eq. 3 written out with torch.roll, a sample, channel, scale and axis at a time."""
    noise, draws = noise.clone(), generator(seed)
    for _ in range(settings.steps):
        for _ in range(settings.rolls):
            shifts = [
                torch.randint(1, min(size) // 2 + 1, (noise.shape[1],), generator=draws).tolist()
                for size in pyramid_sizes(*noise.shape[-2:])
            ]
            gradient = torch.zeros_like(noise)
            for sample, channel in itertools.product(range(len(noise)), range(noise.shape[1])):
                scale, size = noise[sample, channel], 1
                for column in shifts:
                    shift, area = column[channel], scale.numel()
                    own = torch.zeros_like(scale)
                    for axis in (0, 1):
                        ahead, behind = scale.roll(shift, axis), scale.roll(-shift, axis)
                        own += 2 / area * (scale * ahead).mean() * (ahead + behind)
                    own = own.repeat_interleave(size, 0).repeat_interleave(size, 1) / size**2
                    gradient[sample, channel, : own.shape[0], : own.shape[1]] += own
                    scale, size = F.avg_pool2d(scale[None], 2)[0], 2 * size
            noise = noise - settings.autocorrelation_weight / settings.rolls * gradient
        for sample in noise:
            mean, variance, count = sample.mean(), sample.var(), sample.numel()
            slope = 2 * (sample - mean) / (count - 1)
            sample -= settings.kl_weight * (slope - slope / (variance + 1e-7) + 2 * mean / count)
    return noise


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def autocorrelation(noise, reach=8):
    """Mean square of the correlation with the neighbours 1 to `reach` pixels away along both axes."""
    noise = (noise - noise.mean()) / noise.std()
    return (
        torch.stack(
            [
                (noise * torch.roll(noise, shift, axis)).mean((-2, -1))
                for shift in range(1, reach + 1)
                for axis in (-2, -1)
            ]
        )
        .square()
        .mean()
    )


@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if min(size) > 1])
def test_autocorrelation_gradient_is_that_of_the_loss(height, width):
    noise = noise_map(2, 3, height, width)
    shifts = draw_shifts(1, 3, (height, width), generator(1))
    ours = autocorrelation_gradient(noise, neighbour_indices(shifts, (height, width))[0])
    (shifts,) = shifts
    torch.testing.assert_close(ours, differentiate(autocorrelation_loss, noise, shifts), rtol=1e-10, atol=1e-15)
    assert ours.any()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_kl_step_goes_down_the_gradient_of_the_loss(height, width):
    noise = 1.3 * noise_map(2, 3, height, width) + 0.2
    expected = noise - 0.1 * differentiate(kl_loss, noise)
    torch.testing.assert_close(kl_step(noise, 0.1), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (17, 40), (5, 7)])
def test_whole_regularization_follows_the_loops_of_the_paper(height, width):
    settings = NoiseRegularization(steps=2, rolls=3)
    noise = correlated_noise()[..., :height, :width]
    ours = regularize_noise(noise.float(), settings, generator(2))
    theirs = regularize_by_autograd(noise, settings, seed=2)
    assert (ours - theirs).abs().max() <= 2e-6
    assert (theirs - noise).abs().max() >= 1e-3


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 32), (40, 24), (37, 51), (8, 8), (5, 7)])
def test_default_regularization_equals_its_gradients_written_out(height, width):
    noise = correlated_noise(2)[..., :height, :width]
    theirs = regularize_by_rolls(noise, NoiseRegularization(), seed=3)
    ours = regularize_noise(noise.float(), NoiseRegularization(), generator(3))
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    assert (theirs - noise).abs().max() >= 1e-3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_default_regularization_takes_few_operations(context):
    noise = correlated_noise().float()
    with context(), Operations() as operations:
        regularize_noise(noise, NoiseRegularization(), generator())
    assert 0 < operations.count <= 2000


def test_pyramid_halves_until_the_smaller_side_is_at_most_eight():
    assert pyramid_sizes(64, 64) == [(64, 64), (32, 32), (16, 16), (8, 8)]
    assert pyramid_sizes(96, 33) == [(96, 33), (48, 16), (24, 8)]
    assert pyramid_sizes(8, 100) == [(8, 100)]
    assert pyramid_sizes(1, 1) == [(1, 1)]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 24), (5, 9)])
def test_shifts_cover_one_to_half_the_smaller_side_and_are_never_zero(height, width):
    draws = generator()
    shifts = draw_shifts(40, 50, (height, width), draws).flatten(0, 1)
    for (scale_height, scale_width), column in zip(pyramid_sizes(height, width), shifts.unbind(1)):
        half = min(scale_height, scale_width) // 2
        assert column.unique().tolist() == list(range(1, half + 1))


@pytest.mark.parametrize(("height", "width"), [*SIZES, (100, 90), (125, 200), (254, 254)])
def test_shifts_of_all_rolls_are_those_drawn_one_by_one(height, width):
    ours, theirs = generator(7), generator(7)
    rolls = draw_shifts(6, 3, (height, width), ours)
    for roll in rolls:
        columns = [
            torch.randint(1, min(size) // 2 + 1, (3,), generator=theirs) if min(size) > 1 else torch.zeros(3).long()
            for size in pyramid_sizes(height, width)
        ]
        assert torch.equal(roll, torch.stack(columns, 1))
    assert torch.equal(ours.get_state(), theirs.get_state()), "whatever is drawn next must stay the same too"


def test_a_side_of_one_pixel_keeps_its_values_apart_from_their_mean_and_variance():
    noise = noise_map(1, 4, 1, 12, dtype=torch.float32)
    assert torch.equal(regularize_noise(noise, NoiseRegularization(kl_weight=0.0), generator()), noise)


def test_one_pixel_map_stays_finite():
    assert (
        regularize_noise(noise_map(2, 4, 1, 1, dtype=torch.float32), NoiseRegularization(), generator())
        .isfinite()
        .all()
    )


def test_a_batch_gives_each_picture_what_it_gets_alone():
    batch = correlated_noise(3, 32).float()
    together = regularize_noise(batch, NoiseRegularization(), generator(5))
    for row, alone in zip(together.split(1), batch.split(1)):
        torch.testing.assert_close(row, regularize_noise(alone, NoiseRegularization(), generator(5)), rtol=0, atol=1e-6)


def test_a_seed_decides_the_result():
    noise = correlated_noise().float()
    first, again, other = (regularize_noise(noise, NoiseRegularization(), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_random_state_is_neither_read_nor_moved():
    noise = correlated_noise().float()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    regularize_noise(noise, NoiseRegularization(), generator())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32_and_returned_as_it_came(dtype):
    noise = correlated_noise().to(dtype)
    ours = regularize_noise(noise, NoiseRegularization(), generator())
    assert ours.dtype == dtype
    assert torch.equal(ours, regularize_noise(noise.float(), NoiseRegularization(), generator()).to(dtype))


def test_the_given_noise_is_not_written_to():
    noise = correlated_noise().float()
    copy = noise.clone()
    regularize_noise(noise, NoiseRegularization(), generator())
    assert torch.equal(noise, copy)


def test_correlated_noise_becomes_whiter():
    start = noise = correlated_noise().float()
    draws = generator()
    for _ in range(8):
        noise, before = regularize_noise(noise, NoiseRegularization(), draws), noise
        assert autocorrelation(noise) < autocorrelation(before)
    assert autocorrelation(noise) < 0.65 * autocorrelation(start)


def test_kl_alone_brings_mean_and_variance_to_those_of_white_noise():
    noise = (1.5 * noise_map(1, 4, 32, 32) + 0.3).float()
    settings = NoiseRegularization(autocorrelation_weight=0.0, kl_weight=400.0, steps=40)
    result = regularize_noise(noise, settings, generator())
    assert abs(result.mean()) < 0.3 * abs(noise.mean())
    assert abs(result.std() - 1) < 0.3 * abs(noise.std() - 1)
    # Only moved and scaled: correlation with what came in stays complete.
    assert torch.corrcoef(torch.stack([result.flatten(), noise.flatten()]))[0, 1] > 1 - 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        NoiseRegularization(steps=0),
        NoiseRegularization(autocorrelation_weight=0.0, kl_weight=0.0),
        NoiseRegularization(rolls=0, kl_weight=0.0),
    ],
)
def test_switched_off_returns_the_noise_bit_for_bit(settings):
    noise = correlated_noise().float()
    assert torch.equal(regularize_noise(noise, settings, generator()), noise)


def test_no_rolls_leave_the_kl_step():
    noise = correlated_noise().float()
    ours = regularize_noise(noise, NoiseRegularization(rolls=0, steps=1), generator())
    torch.testing.assert_close(ours, noise - 20 * differentiate(kl_loss, noise).float())


@pytest.mark.parametrize("weight", [20.0, 1000.0])
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (4, 4), (4, 9), (8, 8), (16, 16), (64, 64)])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_no_weight_and_no_size_make_it_diverge(size, weight, offset):
    rows = 8 if max(size) < 64 else 2  # as many maps as go quickly
    noise = noise_map(rows, 4, *size, dtype=torch.float32)
    noise += offset * noise_map(rows, 4, 1, 1, seed=1, dtype=torch.float32)
    settings = NoiseRegularization(weight, weight, steps=50, rolls=5)
    result = regularize_noise(noise, settings, generator())
    assert result.isfinite().all()
    assert (kl_loss(result) <= kl_loss(noise)).all()
    assert (result.square().mean((1, 2, 3)) <= noise.square().mean((1, 2, 3)).clamp_min(1.1)).all()


def test_a_heavy_kl_step_lands_on_white_noise_and_not_beyond():
    for factor in (0.2, 3.0):
        result = kl_step(factor * noise_map(2, 4, 8, 8) + 0.5, 1e6)
        torch.testing.assert_close(result.mean((1, 2, 3)), torch.zeros(2, dtype=torch.float64))
        torch.testing.assert_close(result.var((1, 2, 3)), torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0)
