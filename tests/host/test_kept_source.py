"""What lies outside a noise mask stays the source in every method, with every sampler."""

from dataclasses import replace

import comfy.samplers
import plug_and_play_runs as plugged
import prompt_to_prompt_runs as prompted
import pytest
import small_edit as guided
import torch
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from pix2pix_zero.host.methods.prompt_edit import KeptEstimate
from pix2pix_zero.host.sampling.source import NoiseMask
from small_unet import latent

pytestmark = pytest.mark.usefixtures("shallowest_unet", "narrow_unet")

SAMPLERS = comfy.samplers.KSAMPLER_NAMES + ["ddim", "uni_pc", "uni_pc_bh2"]
# Those that end at the last level but zero, and how near to the source there, as part of its spread: dpm_fast goes on
# from what was estimated at noisier levels.
ENDS_ABOVE_ZERO = {"dpm_fast": 0.05, "dpm_adaptive": 1e-3}
OTHER_STEPS = ["dpmpp_2m", "dpmpp_3m_sde", "res_multistep_ancestral", "euler_ancestral", "uni_pc"]


def half(height=8, width=8):
    mask = torch.zeros(1, 8 * height, 8 * width)
    mask[..., : 4 * width] = 1.0
    return mask


def ramp():
    return torch.linspace(0, 1, 8).expand(1, 8, 8)


def prompt_edit(model, clip, inversion, sampler="euler", **options):
    patched, positive = prompted.patch(model, inversion, clip, "a dog on a sofa", **options)
    return prompted.sample(patched, inversion, positive, prompted.encode(clip, ""), sampler=sampler)


def feature_edit(model, clip, inversion, sampler="euler", until=0.5):
    return plugged.sample(plugged.patch(model, inversion, until, until), inversion, sampler=sampler)


@pytest.fixture(scope="module")
def masked(model, clip):
    """The inversion of a picture of which the left half may change."""
    return prompted.invert(model, clip, picture={**latent(), "noise_mask": half()}, method="direct")


@pytest.fixture(scope="module")
def inversion(model, clip):
    return prompted.invert(model, clip)


@pytest.fixture(scope="module")
def direct(model, clip):
    """With the residuals of its steps."""
    return prompted.invert(model, clip, method="direct")


@pytest.fixture(scope="module")
def by_ddim_steps(model, clip, direct, inversion):
    """The edits of either by steps of DDIM."""
    return prompt_edit(model, clip, direct), prompt_edit(model, clip, inversion)


@pytest.mark.parametrize("edited", [prompt_edit, feature_edit])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_the_mask_every_sampler_ends_on_the_source(model, clip, masked, sampler, edited):
    picture = edited(model, clip, masked, sampler)
    assert picture.isfinite().all()
    source = latent()["samples"]
    if sampler in ENDS_ABOVE_ZERO:
        source = model.model.process_latent_out(masked.trajectory[1])
    assert (picture - source)[..., 5:].abs().max() <= ENDS_ABOVE_ZERO.get(sampler, 1e-3) * source.std()
    assert (picture - source)[..., :3].abs().mean() > 1e-2 * source.std()


@pytest.mark.parametrize("sampler", OTHER_STEPS)
def test_residuals_are_for_steps_of_ddim_alone(model, clip, direct, inversion, by_ddim_steps, sampler):
    """A sampler that extrapolates would make noise of them: it draws what it draws of a plain inversion."""
    assert torch.equal(direct.trajectory, inversion.trajectory)
    torch.manual_seed(0)
    ours = prompt_edit(model, clip, direct, sampler)
    torch.manual_seed(0)
    assert torch.equal(ours, prompt_edit(model, clip, inversion, sampler))
    assert not torch.equal(*by_ddim_steps)


@pytest.mark.parametrize("ddim_steps", [False, True])
def test_what_stays_is_the_sources_estimate_unless_the_sampler_steps_as_ddim_does(inversion, ddim_steps):
    """Away from the source's way, where noise was added or a step extrapolated, what lands on it in one step is far off."""
    sigmas = inversion.sigmas.flip(0)
    kept = KeptEstimate(inversion, NoiseMask(torch.zeros(1, 8, 8), None, {}, sigmas), sigmas, ddim_steps)
    sigma, lower = sigmas[1].item(), sigmas[2].item()
    away = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    x = inversion.latent_at(sigma) + sigma * away
    estimate = kept.restore(torch.zeros_like(x), x, sigma, None)
    if ddim_steps:
        landed = x + (x - estimate) / sigma * (lower - sigma)
        torch.testing.assert_close(landed, inversion.latent_at(lower), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(estimate, inversion.estimate_at(sigma))


def test_a_sampler_of_another_pack_is_known_by_its_steps(model, clip, direct, by_ddim_steps, monkeypatch):
    def euler(model_k, x, sigmas, extra_args, callback, disable):
        for sigma, sigma_next in zip(sigmas.tolist(), sigmas.tolist()[1:]):
            x = x + (x - model_k(x, x.new_full((len(x),), sigma), **extra_args)) / sigma * (sigma_next - sigma)
        return x

    expected, _ = by_ddim_steps
    theirs = comfy.samplers.KSAMPLER(euler)
    monkeypatch.setattr(comfy.samplers, "sampler_object", lambda name: theirs)
    assert (prompt_edit(model, clip, direct) - expected).abs().max() <= 1e-5 * expected.std()


def test_how_a_picture_is_stepped_is_seen_of_each_of_a_batch(direct):
    """One goes where DDIM takes it, one slightly off, beside another whose values are a thousand times as large."""
    sigmas = direct.sigmas.flip(0)
    factors = torch.tensor([1.0, 1.0, 1e3]).view(-1, 1, 1, 1)
    strays = torch.tensor([0.0, 0.1, 0.0]).view(-1, 1, 1, 1)

    def restored(rows):
        inversion = replace(
            direct, trajectory=direct.trajectory * factors[rows], residuals=direct.residuals * factors[rows]
        )
        kept = KeptEstimate(inversion, NoiseMask(torch.full((1, 8, 8), 0.5), None, {}, sigmas), sigmas, None)
        x = 0.9 * inversion.latent(-1)
        for sigma, lower in zip(sigmas.tolist()[:3], sigmas.tolist()[1:]):
            denoised = kept.restore(0.5 * x, x, sigma, None)
            x = x + (x - denoised) / sigma * (lower - sigma) + strays[rows] * x.std((1, 2, 3), keepdim=True)
        return x

    together, alone = restored(slice(0, 3)), torch.cat([restored(slice(i, i + 1)) for i in range(3)])
    assert ((together - alone) / factors).abs().max() <= 1e-5 * alone[0].abs().max()


@pytest.mark.parametrize("edited", [prompt_edit, feature_edit])
def test_differential_diffusion_acts_in_every_method(model, clip, inversion, edited):
    """A place is free from the share of the sampling on that its mask leaves; before, it goes along the source."""
    (patched,) = DifferentialDiffusion.execute(model).result
    masked = replace(inversion, noise_mask=ramp())
    table = model.model.model_sampling
    lowest, first = (float(table.timestep(sigma)) for sigma in (table.sigma_min, inversion.sigmas[-1]))

    def blended(args):
        sigma = float(args["sigma"][0])
        level = int((inversion.sigmas - sigma).abs().argmin())
        low, x_low, x_high = inversion.sigmas[level - 1], *inversion.trajectory[level - 1 : level + 1]
        estimate = x_high - (x_high - x_low) / (sigma - low) * sigma
        share = (float(table.timestep(args["sigma"][0])) - lowest) / (first - lowest)
        return torch.where(ramp() >= share, args["denoised"], estimate)

    reference = model.clone()
    reference.set_model_sampler_post_cfg_function(blended)
    expected = edited(reference, clip, inversion)
    assert (edited(patched, clip, masked) - expected).abs().max() <= 1e-4 * expected.std()
    assert (edited(model, clip, masked) - expected).abs().max() > 1e-2 * expected.std(), "the patch must matter"


def test_above_the_inversions_noise_prompt_to_prompt_goes_on_as_plug_and_play_does(model, clip, inversion):
    patched, positive = prompted.patch(model, inversion, clip, "a dog on a sofa")
    higher = inversion.sigmas.flip(0) * 1.1
    higher[-1] = 0.0
    picture = prompted.sample(patched, inversion, positive, prompted.encode(clip, ""), sigmas=higher)
    assert picture.isfinite().all()


@pytest.mark.parametrize("edited", [prompt_edit, feature_edit])
def test_a_sampler_that_enlarges_the_latent_on_its_way_is_named(model, clip, inversion, edited):
    def enlarge(model_k, x, sigmas, extra_args, callback, disable):
        for sigma in sigmas[:-1]:
            x = torch.nn.functional.interpolate(model_k(x, sigma * x.new_ones(1), **extra_args), scale_factor=2.0)
        return x

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"^sampler: .*\(16, 16\).*\(8, 8\)"):
        patch.setattr(comfy.samplers, "sampler_object", lambda name: comfy.samplers.KSAMPLER(enlarge))
        edited(model, clip, inversion)


def test_pictures_with_a_caption_each_are_refused_by_prompt_to_prompt(model, clip):
    rows = torch.cat([prompted.encode(clip, text)[0][0] for text in (prompted.SOURCE, "a red house")])
    with torch.inference_mode():
        inversion = plugged.invert(model, latent(batch=2), [[rows, {}]])
    with pytest.raises(ValueError, match="inversion: its pictures have a caption each"):
        prompted.patch(model, inversion, clip, "a dog on a sofa")


def test_a_mask_of_true_and_false_is_a_mask(model):
    inversion = guided.invert(model)
    ours, expected = (guided.edit(model, inversion, mask=mask) for mask in (half().bool(), half()))
    assert torch.equal(ours, expected)
