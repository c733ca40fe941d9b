"""Inversion and the guided sampler on a small random UNet, through the real guider."""

import functools
from dataclasses import replace

import comfy.samplers
import pytest
import torch
from pix2pix_zero.host.methods.plug_and_play import with_source_features
from pix2pix_zero.host.sampling import edit as edit_room
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import inverted_noise
from pix2pix_zero.host.sampling.reference import ReferenceSettings, generate_reference
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler
from small_edit import MILD, edit, invert
from small_unet import conditioning, latent

pytestmark = pytest.mark.usefixtures("shallow_unet")


@pytest.fixture(scope="module")
def inversion(model):
    return invert(model)


@pytest.fixture(scope="module")
def inversions(model):
    """`inversions(method)`: one by that method."""
    return functools.cache(lambda method: invert(model, method=method))


def test_a_batch_equals_single_runs(model):
    texts, edits = conditioning(rows=3), conditioning(rows=3, seed=1)
    pictures = latent(batch=3, height=8, width=12)
    together = edit(model, invert(model, texts, pictures), edits, texts, strength=6e-5)
    for i in (0, 2):
        one_text, one_edit = [[texts[0][0][i : i + 1], {}]], [[edits[0][0][i : i + 1], {}]]
        picture = {"samples": pictures["samples"][i : i + 1]}
        alone = edit(model, invert(model, one_text, picture), one_edit, one_text, strength=6e-5)
        difference = model.model.process_latent_in(together[i : i + 1] - alone)
        assert difference.abs().max() <= 1e-4


def test_captions_that_come_as_a_list_go_to_their_pictures(model, run_node):
    texts, edits = conditioning(rows=2), conditioning(rows=2, seed=1)
    as_list = [[[text[None], {}]] for text in texts[0][0]]
    edits_as_list = [[[text[None], {}]] for text in edits[0][0]]
    pictures = latent(batch=2)
    settings = dict(
        steps=[3],
        seed=[0],
        autocorrelation_weight=[MILD.autocorrelation_weight],
        kl_weight=[MILD.kl_weight],
        regularization_steps=[MILD.steps],
        autocorrelation_rolls=[MILD.rolls],
        method=["direct"],
    )
    inversions, *others = run_node(
        Pix2PixZeroInversion, model=[model], positive=as_list, latent_image=[pictures], **settings
    )
    assert [len(output) for output in (inversions, *others)] == [1, 1, 1, 1]
    window = dict(start_percent=[0.0], end_percent=[1.0], preset=["default"], local_blend=[0.0], feature_until=[0.0])
    latents, areas = run_node(
        Pix2PixZeroKSampler,
        model=[model],
        inversion=inversions,
        positive=edits_as_list,
        negative=as_list,
        cfg=[2.0],
        guidance_strength=[0.005],
        **window,
    )
    expected = edit(model, invert(model, texts, pictures), edits, texts)
    assert len(latents) == len(areas) == 1
    assert torch.equal(latents[0]["samples"], expected)


def test_stock_sampling_from_noise_and_sigmas_equals_the_unguided_sampler(model, inversions):
    """The outputs `noise` and `sigmas` drive SamplerCustomAdvanced with euler, which is DDIM in sigma space."""
    with torch.inference_mode():
        inversion = inversions("ddim")
        expected = edit(model, inversion, strength=0.0)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conditioning(seed=1), conditioning())
        guider.set_cfg(2.0)
        noise = inverted_noise(inversion, model)
        stock = guider.sample(
            torch.zeros_like(noise), noise, comfy.samplers.sampler_object("euler"), inversion.sigmas.flip(0)
        )
    assert (stock - expected).abs().max() <= 1e-4 * expected.std()


def test_features_of_the_picture_are_put_in_as_plug_and_play_does(model):
    """Without guidance, blend and residuals it is euler on the MODEL of the other node, without its attention."""
    with torch.inference_mode():
        inversion = invert(model, method="ddim", steps=4)
        edits = [edit(model, inversion, strength=0.0, feature_until=share) for share in (0.0, 0.5)]
        guider = comfy.samplers.CFGGuider(with_source_features(model, inversion, 0.5, 0.0))
        guider.set_conds(conditioning(seed=1), conditioning())
        guider.set_cfg(2.0)
        noise = inverted_noise(inversion, model)
        stock = guider.sample(
            torch.zeros_like(noise), noise, comfy.samplers.sampler_object("euler"), inversion.sigmas.flip(0)
        )
    assert (edits[1] - stock).abs().max() <= 1e-4 * stock.std()
    assert (edits[1] - edits[0]).abs().max() > 1e-2 * stock.std()


def test_features_leave_the_unedited_picture_and_the_kept_maps_as_they_are(model, inversion):
    same = edit(model, inversion, conditioning(), conditioning(), feature_until=1.0)
    assert (same - latent()["samples"]).abs().max() <= 1e-3 * same.std()
    kept, recorded = (edit(model, of_maps, feature_until=0.7) for of_maps in (inversion, replace(inversion, maps=None)))
    assert (kept - recorded).abs().max() <= 1e-3 * kept.std()


@pytest.mark.parametrize("method", ["ddim", "fixed-point"])
@pytest.mark.parametrize("strength", [0.0, 0.005])
def test_the_caption_as_negative_takes_the_scale_of_guidance_out(model, inversions, method, strength):
    """Negative-prompt inversion (Miyake et al. 2023): without an edit any cfg redraws the picture as cfg 1 does."""
    inversion = inversions(method)
    source, others = conditioning(), conditioning(seed=2)
    plain = edit(model, inversion, source, source, strength, cfg=1.0)
    guided = edit(model, inversion, source, source, strength, cfg=7.5)
    assert (guided - plain).abs().max() <= 1e-4 * plain.std()
    another = edit(model, inversion, source, others, strength, cfg=7.5)
    assert (another - plain).abs().max() > 1e-2 * plain.std()


def test_unmasked_part_is_the_source_exactly(model):
    picture = latent()
    picture["noise_mask"] = torch.zeros(1, 8, 8)
    picture["noise_mask"][..., :4] = 1.0
    edited = edit(model, invert(model, picture=picture))
    assert (edited - picture["samples"])[..., 4:].abs().max() < 1e-5
    assert (edited - picture["samples"])[..., :4].abs().mean() > 0.1


@pytest.mark.parametrize("shape", [(8, 12), (6, 10), (2, 4)])
def test_any_size_the_model_takes(model, shape):
    edited = edit(model, invert(model, picture=latent(1, *shape)))
    assert edited.shape == (1, 4, *shape)
    assert edited.isfinite().all()


def test_guidance_pulls_the_maps_towards_the_source(model, inversion):
    distances = []

    class Passes(edit_room.UNetPasses):
        def denoise_and_match(self, *args):
            denoised, gradient, distance = super().denoise_and_match(*args)
            distances[-1].append(distance.item())
            return denoised, gradient, distance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit_room, "UNetPasses", Passes)
        for strength in (1e-9, 1.2e-3):
            distances.append([])
            edit(model, inversion, strength=strength)
    free, guided = distances
    assert guided[0] == pytest.approx(free[0])
    assert sum(guided) < sum(free)


def test_the_guidance_window_is_respected(model, inversion):
    free = edit(model, inversion, strength=0.0)
    assert torch.equal(edit(model, inversion, window=(0.99999, 1.0)), free)
    assert not torch.equal(edit(model, inversion, window=(0.0, 0.5)), free)


def test_generated_reference_is_the_picture_its_trajectory_ends_on(model):
    with torch.inference_mode():
        empty = {"samples": torch.zeros(2, 4, 8, 8)}
        inversion, samples = generate_reference(
            model, conditioning(), conditioning(seed=2), empty, ReferenceSettings(3, 2.0, 7)
        )
        again = edit(model, inversion, conditioning(), conditioning(seed=2), strength=0.0)
    assert (again - samples).abs().max() <= 1e-4 * samples.std()
    assert not torch.equal(samples[0], samples[1])


@pytest.mark.parametrize("negative_seed", [0, 9], ids=["the caption as negative", "another negative"])
@pytest.mark.parametrize("cfg", [2.0, 1.0])
@pytest.mark.parametrize("strength", [0.0, 0.005])
def test_contrast_is_that_of_edited_and_source_text(model, inversion, negative_seed, cfg, strength):
    """Whatever branches the sampler needs for itself. Checked against two evaluations of their own at each latent."""
    seen = []

    class Passes(edit_room.UNetPasses):
        def contrast(self, x, sigma):
            contrast = super().contrast(x, sigma)
            edited, source = (self.denoise_branch(branch, x, sigma) for branch in ("positive", "source"))
            seen.append((contrast, (edited - source).abs().mean(1, keepdim=True)))
            return contrast

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(edit_room, "UNetPasses", Passes)
        settings = EditSettings(cfg, strength, local_blend=0.3)
        _, area = sample_edit(model, inversion, conditioning(seed=1), conditioning(seed=negative_seed), settings)
    assert len(seen) == inversion.steps
    for ours, expected in seen:
        assert expected.max() > 0
        assert (ours - expected).abs().max() <= 1e-4 * expected.max()
    assert area.shape == (1, 64, 64)


def sampled(model, run_node, inversion, **settings):
    inputs = dict(
        model=model,
        inversion=inversion,
        positive=conditioning(seed=1),
        negative=conditioning(),
        cfg=2.0,
        guidance_strength=0.005,
        start_percent=0.0,
        end_percent=1.0,
        preset="default",
        **settings,
    )
    return run_node(Pix2PixZeroKSampler, **{name: [value] for name, value in inputs.items()})


def test_the_sampler_shows_where_it_let_the_picture_change(model, run_node, monkeypatch):
    class LeftHalf(edit_room.UNetPasses):
        def contrast(self, x, sigma):
            contrast = super().contrast(x, sigma)
            contrast[..., 8:] = 0.0
            return contrast

    monkeypatch.setattr(edit_room, "UNetPasses", LeftHalf)
    inversion = invert(model, picture=latent(1, 16, 16))
    (free,), (everywhere,) = sampled(model, run_node, inversion, local_blend=0.0, feature_until=0.0)
    assert torch.equal(everywhere, torch.ones(1, 128, 128))
    (blended,), (area,) = sampled(model, run_node, inversion, local_blend=0.5, feature_until=0.0)
    assert area.shape == (1, 128, 128)
    assert area[..., :64].max() > 0.9
    assert area[..., 80:].max() == 0
    source = inversion.trajectory[0] / model.model.latent_format.scale_factor
    assert (blended["samples"] - source)[..., 10:].abs().max() < 1e-5
    assert (free["samples"] - source)[..., 10:].abs().mean() > 0.1


def test_a_mask_on_the_sampler_limits_the_edit_like_a_noise_mask(model, run_node):
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1.0
    picture = latent()
    (ours,), (area,) = sampled(model, run_node, invert(model, picture=picture), mask=mask)
    (theirs,), (other_area,) = sampled(model, run_node, invert(model, picture={**picture, "noise_mask": mask}))
    assert torch.equal(ours["samples"], theirs["samples"])
    assert torch.equal(area, other_area)
    assert (ours["samples"] - picture["samples"])[..., 4:].abs().max() < 1e-5
    assert area[..., :28].min() > 0.99
    assert area[..., 36:].max() < 0.01
