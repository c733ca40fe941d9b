"""Every sampler of the host, with Plug-and-Play and Prompt-to-Prompt of a picture that no mask limits."""

import functools

import comfy.samplers
import plug_and_play_runs as plugged
import prompt_to_prompt_runs as prompted
import pytest
import torch

SAMPLERS = sorted({*comfy.samplers.KSAMPLER_NAMES, "ddim", "uni_pc", "uni_pc_bh2"})
# They go along the estimate alone, from level to level, as the inversion has come: its residuals are for them.
DDIM_STEPS = {"euler", "ddim"}
# What an adaptive sampler takes for near enough: else it evaluates the model about eight times as often as the others.
OPTIONS = {"dpm_adaptive": {"rtol": 0.5, "h_init": 0.5}}
TARGET = "a dog on a sofa"
pytestmark = pytest.mark.usefixtures("shallowest_unet", "narrow_unet")


@pytest.fixture(scope="module")
def inversions(model, clip):
    """With the residuals of its steps, and without."""
    found = {method: prompted.invert(model, clip, method=method) for method in ("direct", "ddim")}
    assert found["direct"].residuals.abs().max() > 0.1 * found["direct"].trajectory[0].std()
    return found


class Watched(comfy.samplers.CFGGuider):
    """Keeps (noise level, estimate) of each evaluation, as the sampler gets it."""

    def __init__(self, model):
        super().__init__(model)
        self.seen = []

    def __call__(self, x, sigma, *args, **kwargs):
        estimate = super().__call__(x, sigma, *args, **kwargs)
        self.seen.append((float(sigma.max()), estimate))
        return estimate


@pytest.fixture(scope="module")
def drawn(clip, inversions):
    """`drawn(model, sampler)`: what a stock sampler ends on, from the inverted noise, and what it was told."""
    texts = [prompted.encode(clip, text) for text in (TARGET, "")]

    @torch.inference_mode()
    def run(model, sampler):
        torch.manual_seed(0)
        guider = Watched(model)
        guider.set_conds(*texts)
        guider.set_cfg(2.0)
        noise = prompted.inverted_noise(inversions["direct"], model)
        stock, sigmas = comfy.samplers.sampler_object(sampler), inversions["direct"].sigmas.flip(0)
        stock.extra_options = OPTIONS.get(sampler, {})
        picture = guider.sample(torch.zeros_like(noise), noise, stock, sigmas, disable_pbar=True, seed=0)
        return picture, guider.seen

    return run


@pytest.fixture(scope="module")
def plain(model, drawn):
    """`plain(sampler)`: what it ends on with the model alone."""
    return functools.cache(lambda sampler: drawn(model, sampler)[0])


def plug(model, clip, inversion, until):
    return plugged.patch(model, inversion, until, until)


def prompt(model, clip, inversion, until, **options):
    return prompted.patch(model, inversion, clip, TARGET, cross=until, to_itself=until, **options)[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_that_takes_nothing_of_the_source_leaves_every_sampler_as_it_is(
    model, clip, inversions, drawn, plain, sampler
):
    expected = plain(sampler)
    for edit, method in ((plug, "direct"), (prompt, "ddim" if sampler in DDIM_STEPS else "direct")):
        picture, _ = drawn(edit(model, clip, inversions[method], 0.0), sampler)
        assert (picture - expected).abs().max() <= 1e-4 * expected.std(), edit


@pytest.mark.parametrize("sampler", sorted({*SAMPLERS} - DDIM_STEPS))
def test_residuals_of_the_inversions_steps_are_not_for_other_steps(model, clip, inversions, drawn, sampler):
    picture, _ = drawn(prompt(model, clip, inversions["direct"], 0.5), sampler)
    expected, _ = drawn(prompt(model, clip, inversions["ddim"], 0.5), sampler)
    assert torch.equal(picture, expected)
    assert picture.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_sources_features_leave_every_sampler_sane(model, clip, inversions, drawn, plain, sampler):
    """About as far from the source as what the sampler draws of the text alone."""
    picture, _ = drawn(plug(model, clip, inversions["direct"], 0.5), sampler)
    source = prompted.latent()["samples"]
    assert picture.isfinite().all()
    assert (picture - source).std() <= 1.5 * (plain(sampler) - source).std()


@pytest.mark.parametrize("sampler", sorted({*SAMPLERS} - DDIM_STEPS))
def test_where_nothing_may_change_every_sampler_is_told_the_source(model, clip, inversions, drawn, sampler):
    """By a local blend at its highest threshold, from the second of 4 steps on. What it is told is the source's own
    estimate and not one that would take a step of DDIM back to it, which others blow up.
    """
    inversion = inversions["direct"]
    _, seen = drawn(prompt(model, clip, inversion, 0.5, local_blend=1.0), sampler)
    below = [(sigma, estimate) for sigma, estimate in seen if 0 < sigma < inversion.sigmas[-1] * 0.999]
    assert below
    for sigma, estimate in below:
        source = inversion.estimate_at(sigma)
        assert (estimate - source).abs().max() <= 1e-3 * source.std(), sigma
