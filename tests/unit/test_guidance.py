"""The guidance loops against Algorithm 1 and the authors' edit_pipeline.py, restated in variance-preserving space."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from pix2pix_zero.editing.guidance import (
    GuidanceSchedule,
    KeptSource,
    LocalBlend,
    attention_distance,
    distance_step,
    plain_step,
    sample_guided,
)
from pix2pix_zero.editing.official import sample_official
from pix2pix_zero.editing.trajectory import Inversion
from toy_diffusion import ALPHA_BAR, SIGMA, sigmas, step_in_alpha_bar, timestep_of, timesteps, vp_scale

STEPS = 5
CFG = 3.0
TEXTS = {"source": 0.2, "positive": 0.9, "negative": -0.4}


def toy_unet(x, text, t):
    """(eps, maps) of one row [C, H, W]: maps [heads, pixels, tokens] that depend on latent, text and timestep."""
    eps = torch.tanh(x * (0.6 + t / 2000) + text) + 0.2 * x.roll(1, -1)
    tokens = torch.linspace(-1, 1, 3, dtype=x.dtype)
    logits = torch.stack([(x.mean(0).flatten()[:, None] + text) * tokens * gain for gain in (1.0, 3.0)])
    return eps, logits.softmax(-1)


class ToyPasses:
    """The protocol, carried out on the toy with autograd; `calls` holds every (evaluation, branch, sigma)."""

    def __init__(self, predicts_v=False):
        self.predicts_v = predicts_v
        self.calls = []

    def _rows(self, branch, x, sigma):
        return [toy_unet(row / vp_scale(sigma), TEXTS[branch], timestep_of(sigma)) for row in x]

    def denoise_branch(self, branch, x, sigma):
        self.calls.append(("denoise", branch, sigma))
        output = torch.stack([eps for eps, _ in self._rows(branch, x, sigma)])
        if self.predicts_v:
            return x / (1 + sigma**2) - output * sigma / vp_scale(sigma)
        return x - sigma * output

    def estimate_elsewhere(self, denoised, x, x_there, sigma):
        return denoised + (x_there - x) / (1 + sigma**2 if self.predicts_v else 1)

    def mix_branches(self, positive, negative, x, sigma):
        return negative + CFG * (positive - negative)

    def denoise(self, x, sigma, hold_negative=False):
        branches = (self.denoise_branch(branch, x, sigma) for branch in ("positive", "negative"))
        return self.mix_branches(*branches, x, sigma)

    def record_maps(self, branch, x, sigma):
        self.calls.append(("record", branch, sigma))
        return {"site": torch.stack([maps for _, maps in self._rows(branch, x, sigma)])}

    def map_gradient(self, branch, x, sigma, reference):
        self.calls.append(("gradient", branch, sigma))
        x = x.detach().requires_grad_(True)
        maps = torch.stack([maps for _, maps in self._rows(branch, x, sigma)])
        distance = attention_distance(maps, reference["site"])
        return torch.autograd.grad(distance.sum(), x)[0], distance.detach()

    def contrast(self, x, sigma):
        edited, source = (self.denoise_branch(branch, x, sigma) for branch in ("positive", "source"))
        return (edited - source).abs().mean(1, keepdim=True)

    def denoise_and_match(self, x, sigma, reference, hold_negative=False):
        return self.denoise(x, sigma, hold_negative), *self.map_gradient("positive", x, sigma, reference)


def inversion(batch=1, steps=STEPS):
    generator = torch.Generator().manual_seed(4)
    levels = sigmas(steps)
    clean = torch.randn(batch, 4, 4, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch, 4, 4, 5, generator=generator, dtype=torch.float64)
    trajectory = torch.stack([clean + level * noise for level in levels])
    return Inversion(trajectory, levels, [], weakref.ref(ToyPasses))


def run(loop, source, passes, strength=None, kept=None, on_step=lambda *step: None, **schedule):
    """By the loop's own step, unless `plain` says otherwise."""
    schedule = {"plain": loop is sample_official} | schedule
    strength = (2.0 if schedule["plain"] else 0.3) if strength is None else strength
    guidance = GuidanceSchedule(strength, final_sigma=float(SIGMA[0]), **schedule)
    return loop(source, passes, source.trajectory[-1], guidance, kept or KeptSource(source), on_step)


def blended(source, passes, blend=None, **options):
    return run(sample_guided, source, passes, kept=KeptSource(source, blend=blend or LocalBlend(0.5)), **options)


def their_distance(maps, reference):
    """Pix2PixZeroL2Loss, maps [heads of the whole batch, pixels, tokens]."""
    return ((maps - reference) ** 2).sum((1, 2)).mean(0)


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


@pytest.mark.parametrize(("positive", "all_bounded"), [(0.21, False), (0.9, True)])
def test_default_loop_is_polyaks_step_no_longer_than_the_ddim_step(positive, all_bounded, monkeypatch):
    """Both restated on the variance-preserving latent."""
    monkeypatch.setitem(TEXTS, "positive", positive)
    strength, source = 0.05, inversion()
    ours = run(sample_guided, source, ToyPasses(), strength)
    x = source.trajectory[-1][0] / vp_scale(float(source.sigmas[-1]))
    bounded = []
    for level, t in zip(range(STEPS, 0, -1), reversed(timesteps(STEPS))):
        _, reference = toy_unet(source.trajectory[level][0] * ALPHA_BAR[t].sqrt(), TEXTS["source"], t)
        leaf = x.clone().requires_grad_(True)
        _, maps = toy_unet(leaf, TEXTS["positive"], t)
        distance = their_distance(maps, reference)
        (gradient,) = torch.autograd.grad(distance, leaf)
        there = torch.tensor(1.0, dtype=torch.float64) if level == 1 else ALPHA_BAR[t - 1000 // STEPS]
        angle = ALPHA_BAR[t].sqrt().acos() - there.sqrt().acos()
        full = distance / gradient.square().sum() * gradient
        bounded.append(bool(full.square().mean().sqrt() > angle))
        if bounded[-1]:
            full = full * angle / full.square().mean().sqrt()
        shift = (1 - (1 - strength) ** (50 / STEPS)) * full.detach()
        negative, positive = (toy_unet(x, TEXTS[branch], t)[0] for branch in ("negative", "positive"))
        eps = negative + CFG * (positive - negative)
        x = step_in_alpha_bar(x, eps, ALPHA_BAR[t], there) - (there / ALPHA_BAR[t]).sqrt() * shift
    torch.testing.assert_close(ours[0], x, rtol=1e-9, atol=1e-9)
    assert all(bounded) is all_bounded


def test_the_papers_loop_is_algorithm_1_on_the_conditional_branch_with_the_shift_after_the_step():
    strength = 2.0
    source = inversion()
    ours = run(sample_guided, source, ToyPasses(), strength, plain=True)

    x = source.trajectory[-1][0] / vp_scale(float(source.sigmas[-1]))
    shifts = []
    for level, t in zip(range(STEPS, 0, -1), reversed(timesteps(STEPS))):
        _, reference = toy_unet(source.trajectory[level][0] * ALPHA_BAR[t].sqrt(), TEXTS["source"], t)
        leaf = x.clone().requires_grad_(True)
        _, maps = toy_unet(leaf, TEXTS["positive"], t)
        shifts.append(strength * 50 / STEPS * torch.autograd.grad(their_distance(maps, reference), leaf)[0])
        negative, positive = (toy_unet(x, TEXTS[branch], t)[0] for branch in ("negative", "positive"))
        eps = negative + CFG * (positive - negative)
        there = torch.tensor(1.0, dtype=torch.float64) if level == 1 else ALPHA_BAR[t - 1000 // STEPS]
        scale = (there / ALPHA_BAR[t]).sqrt()  # one size of shift in sigma space, where x = x_vp / sqrt(alpha_bar)
        x = step_in_alpha_bar(x, eps, ALPHA_BAR[t], there) - scale * shifts[-1]

    torch.testing.assert_close(ours[0], x, rtol=1e-9, atol=1e-9)
    assert min(shift.abs().max() for shift in shifts) > 1e-3, "guidance must matter for the comparison to mean anything"


@pytest.mark.parametrize("predicts_v", [False, True], ids=["eps", "v"])
def test_official_loop_is_that_of_edit_pipeline(predicts_v):
    """Reconstruction pass first, then the edit on a batch [negative, positive] whose first half steps on."""
    strength = 2.0
    source = inversion()
    ours = run(sample_official, source, ToyPasses(predicts_v), strength)

    start = source.trajectory[-1][0] / vp_scale(float(source.sigmas[-1]))
    grid = list(reversed(timesteps(STEPS)))

    def step(x, outputs, t):
        output = outputs[0] + CFG * (outputs[1] - outputs[0])
        eps = ALPHA_BAR[t].sqrt() * output + (1 - ALPHA_BAR[t]).sqrt() * x if predicts_v else output
        return step_in_alpha_bar(x, eps, ALPHA_BAR[t], ALPHA_BAR[max(t - 1000 // STEPS, 0)])

    x, references = start, {}
    for t in grid:
        outputs, maps = zip(*(toy_unet(x, TEXTS[branch], t) for branch in ("negative", "source")))
        references[t] = torch.cat(maps)
        x = step(x, outputs, t)
    x = start
    for t in grid:
        halves = torch.stack([x, x]).requires_grad_(True)
        _, maps = zip(*(toy_unet(half, TEXTS[branch], t) for half, branch in zip(halves, ("negative", "positive"))))
        (gradient,) = torch.autograd.grad(their_distance(torch.cat(maps), references[t]), halves)
        halves = (halves - strength * gradient).detach()
        outputs, _ = zip(*(toy_unet(half, TEXTS[branch], t) for half, branch in zip(halves, ("negative", "positive"))))
        x = step(halves[0], outputs, t)

    torch.testing.assert_close(ours[0], x, rtol=1e-9, atol=1e-9)
    unguided = run(sample_official, source, ToyPasses(predicts_v), 0.0)
    assert (unguided - ours).norm() > 0.01 * ours.norm()


@pytest.mark.parametrize("loop", [sample_guided, sample_official])
def test_each_picture_of_a_batch_is_edited_as_it_is_alone(loop):
    batch = inversion(batch=2)
    together = run(loop, batch, ToyPasses())
    for i, row in enumerate(together.split(1)):
        alone = Inversion(batch.trajectory[:, i : i + 1], batch.sigmas, [], batch.model)
        torch.testing.assert_close(row, run(loop, alone, ToyPasses()))


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


def test_the_negative_is_held_at_every_other_step_guided_or_not():
    held = []

    class Noting(ToyPasses):
        def denoise(self, x, sigma, hold_negative=False):
            held.append(hold_negative)
            return super().denoise(x, sigma)

    run(sample_guided, inversion(), Noting(), every=3, holds_negative=True)
    assert held == [False, True, False, True, False]
    held.clear()
    run(sample_guided, inversion(), Noting())
    assert not any(held)


def test_default_loop_matches_the_edited_branch_with_the_source_at_every_level():
    passes = ToyPasses()
    run(sample_guided, inversion(), passes)
    descending = sigmas(STEPS).tolist()[:0:-1]
    assert [(branch, sigma) for call, branch, sigma in passes.calls if call == "record"] == [
        ("source", sigma) for sigma in descending
    ]
    assert [(branch, sigma) for call, branch, sigma in passes.calls if call == "gradient"] == [
        ("positive", sigma) for sigma in descending
    ]


@pytest.mark.parametrize(
    "step",
    [
        lambda gradient, distance, sigma: plain_step(gradient, sigma, 0.05),
        lambda gradient, distance, sigma: distance_step(gradient, distance, 0.05, longest=1e9),
    ],
    ids=["the paper's", "part of the distance"],
)
def test_guidance_lowers_the_distance_to_the_source(step):
    """At each level, one small step must bring the maps closer than they were."""
    source, passes = inversion(), ToyPasses()
    for level in range(1, STEPS + 1):
        sigma = float(source.sigmas[level])
        reference = passes.record_maps("source", source.trajectory[level], sigma)
        x = source.trajectory[level]
        gradient, before = passes.map_gradient("positive", x, sigma, reference)
        _, after = passes.map_gradient("positive", x + step(gradient, before, sigma), sigma, reference)
        assert (after < before).all()


@pytest.mark.parametrize("loop", [sample_guided, sample_official])
def test_what_is_kept_outside_the_mask_is_written_back_at_every_level(loop):
    source, levels = inversion(), []

    def nowhere(level):
        levels.append(level)
        return torch.zeros(1, 1, 4, 5, dtype=torch.float64)

    final = run(loop, source, ToyPasses(), kept=KeptSource(source, nowhere))
    assert levels == list(range(STEPS - 1, -1, -1))
    torch.testing.assert_close(final, source.trajectory[0])


@pytest.mark.parametrize("loop", [sample_guided, sample_official])
def test_every_step_is_reported_in_order(loop):
    steps = []
    run(
        loop,
        inversion(),
        ToyPasses(),
        on_step=lambda index, denoised, x, distance: steps.append((index, denoised.shape, x.shape)),
    )
    assert steps == [(index, (1, 4, 4, 5), (1, 4, 4, 5)) for index in range(STEPS)]


@pytest.mark.parametrize("loop", [sample_guided, sample_official])
def test_guided_steps_report_the_distance_they_found_and_others_none(loop):
    """At the first step, where edit and source are still at one place, only the texts tell their maps apart."""
    source, distances = inversion(batch=2), []
    run(loop, source, ToyPasses(), every=2, on_step=lambda index, denoised, x, distance: distances.append(distance))
    assert [distance is not None for distance in distances] == [False, True, False, True, False]
    distances.clear()
    run(loop, source, ToyPasses(), on_step=lambda index, denoised, x, distance: distances.append(distance))
    seen = source.trajectory[-1] / vp_scale(float(source.sigmas[-1]))
    own, reference = (
        torch.stack([toy_unet(row, TEXTS[text], timesteps(STEPS)[-1])[1] for row in seen])
        for text in ("positive", "source")
    )
    expected = torch.stack([their_distance(a, b) for a, b in zip(own, reference)])
    torch.testing.assert_close(distances[0], expected)


def test_the_source_is_kept_where_the_edit_does_not_act():
    class LeftOnly(ToyPasses):
        def contrast(self, x, sigma):
            contrast = torch.zeros_like(x[:, :1])
            contrast[..., :2] = 1.0
            return contrast

    source, blend = inversion(), LocalBlend(0.5)
    final = blended(source, LeftOnly(), blend)
    mask = blend.mask.expand_as(final)
    assert (mask == 0).any(), "or there is nothing to see"
    assert (mask == 1).any()
    assert torch.equal(final[mask == 0], source.trajectory[0][mask == 0])
    free = run(sample_guided, source, LeftOnly())
    assert (final - free)[mask == 1].abs().max() < (final - source.trajectory[0])[mask == 1].abs().max()


def test_an_edit_that_acts_everywhere_is_neither_blended_nor_guided():
    class Everywhere(ToyPasses):
        def contrast(self, x, sigma):
            return torch.ones_like(x[:, :1])

    passes = Everywhere()
    ours = blended(inversion(), passes)
    # The first evaluation, which tells, has computed the gradient already.
    assert [evaluation for evaluation, *_ in passes.calls].count("gradient") == 1
    torch.testing.assert_close(ours, run(sample_guided, inversion(), Everywhere(), share=0.0))


def test_pictures_that_are_edited_in_part_are_guided_beside_one_that_is_edited_as_a_whole():
    class Mixed(ToyPasses):
        def contrast(self, x, sigma):
            contrast = torch.ones_like(x[:, :1])
            contrast[len(x) // 2 :, ..., :2] = 0.0
            return contrast

    class Whole(ToyPasses):
        def contrast(self, x, sigma):
            return torch.ones_like(x[:, :1])

    class Part(ToyPasses):
        def contrast(self, x, sigma):
            contrast = torch.ones_like(x[:, :1])
            contrast[..., :2] = 0.0
            return contrast

    source = inversion(batch=2)
    together = blended(source, Mixed())
    for row, passes in enumerate((Whole(), Part())):
        alone = replace(source, trajectory=source.trajectory[:, row : row + 1])
        expected = blended(alone, passes)
        torch.testing.assert_close(together[row : row + 1], expected)
