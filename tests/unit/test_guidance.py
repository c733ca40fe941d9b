"""The guidance loops against Algorithm 1 and the authors' edit_pipeline.py, restated in variance-preserving space."""

from dataclasses import replace

import pytest
import torch
from guidance_toy import CFG, STEPS, TEXTS, ToyPasses, blended, inversion, run, their_distance, their_gradient, toy_unet
from pix2pix_zero.editing.guidance import KeptSource, LocalBlend, distance_step, plain_step, sample_guided
from pix2pix_zero.editing.official import sample_official
from pix2pix_zero.editing.trajectory import Inversion
from toy_diffusion import ALPHA_BAR, sigmas, step_in_alpha_bar, timesteps, vp_scale


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
        distance, gradient = their_gradient(x, t, reference)
        there = torch.tensor(1.0, dtype=torch.float64) if level == 1 else ALPHA_BAR[t - 1000 // STEPS]
        angle = ALPHA_BAR[t].sqrt().acos() - there.sqrt().acos()
        full = distance / gradient.square().sum() * gradient
        bounded.append(bool(full.square().mean().sqrt() > angle))
        if bounded[-1]:
            full = full * angle / full.square().mean().sqrt()
        shift = (1 - (1 - strength) ** (50 / STEPS)) * full
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
        shifts.append(strength * 50 / STEPS * their_gradient(x, t, reference)[1])
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
