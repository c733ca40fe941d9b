"""Plug-and-Play in the stock samplers, against features recorded with forward hooks on an untouched UNet."""

import comfy.samplers
import pytest
import torch
from pix2pix_zero.editing.trajectory import ddim_step
from pix2pix_zero.host.sampling.invert import inverted_noise
from plug_and_play_runs import CONFIG, SITES, STEPS, distance, edited_calls, invert, patch, sample, source_features
from small_unet import changed, conditioning, latent, small_model

import nodes as host_nodes


@pytest.fixture(scope="module", autouse=True)
def few_transformers():
    with changed(CONFIG):
        yield


@pytest.fixture(scope="module")
def inversion(model):
    return invert(model)


@pytest.mark.parametrize("pictures", [1, 2])
def test_features_and_attention_of_both_halves_are_the_sources(model, pictures):
    inversion = invert(model, latent(batch=pictures))
    calls = edited_calls(model, inversion, rows=2 * pictures)
    assert len(calls) == STEPS
    for call, level in zip(calls, range(STEPS, 0, -1)):
        source = source_features(inversion, level, conditioning()[0][0])
        for name, expected in source.items():
            for half in call[name].chunk(2):
                assert distance(half, expected) < 1e-5, (level, name)


def test_the_values_of_attention_stay_the_edits_own(model, inversion):
    for call in edited_calls(model, inversion, rows=2):
        for number, _ in SITES:
            assert torch.equal(call["v", number], call["own v", number])


def test_each_window_ends_after_its_share_of_the_steps(model, inversion):
    calls = edited_calls(model, inversion, rows=2, feature_until=0.6, attention_until=0.4)
    for step, call in enumerate(calls):
        source = source_features(inversion, STEPS - step, conditioning()[0][0])
        assert (distance(call["branch"][:1], source["branch"]) < 1e-5) == (step < 3)
        for number, _ in SITES[
            1:
        ]:  # the first one's q and k follow from the features alone, up to what the skip brings
            assert (distance(call["q", number][:1], source["q", number]) < 1e-5) == (step < 2)
            assert (distance(call["k", number][:1], source["k", number]) < 1e-5) == (step < 2)


def test_halves_that_run_apart_are_replaced_too(model, inversion, monkeypatch):
    together = sample(patch(model, inversion), inversion)
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 2**62)
    apart = sample(patch(model, inversion), inversion)
    assert (together - apart).abs().max() < 1e-4 * together.std()


def test_without_windows_it_is_the_stock_sampler(model, inversion):
    assert torch.equal(sample(patch(model, inversion, 0.0, 0.0), inversion), sample(model, inversion))


def test_a_batch_equals_single_runs(model):
    texts, edits = conditioning(rows=2), conditioning(rows=2, seed=1)
    pictures = latent(batch=2, height=8, width=12)
    inversion = invert(model, pictures, texts)
    together = sample(patch(model, inversion, 0.8, 0.5), inversion, edits)
    for i in range(2):
        one = invert(model, {"samples": pictures["samples"][i : i + 1]}, [[texts[0][0][i : i + 1], {}]])
        alone = sample(patch(model, one, 0.8, 0.5), one, [[edits[0][0][i : i + 1], {}]])
        assert (together[i : i + 1] - alone).abs().max() < 1e-4 * alone.std()


def test_a_repeated_picture_takes_one_text_each(model, inversion):
    texts = conditioning(rows=2, seed=1)
    noise = inverted_noise(inversion, model).repeat(2, 1, 1, 1)
    both = sample(patch(model, inversion), inversion, texts, noise=noise)
    for i in range(2):
        alone = sample(patch(model, inversion), inversion, [[texts[0][0][i : i + 1], {}]])
        assert (both[i : i + 1] - alone).abs().max() < 1e-4 * alone.std()


def test_the_ksampler_node_gives_the_same(model, inversion, run_node):
    patched = patch(model, inversion, 0.8, 0.5)
    noise = {"samples": inverted_noise(inversion, model)}
    with torch.inference_mode():
        texts = conditioning(seed=1), conditioning(seed=2)
        (latents,) = host_nodes.KSamplerAdvanced().sample(
            patched, "disable", 0, STEPS, 2.0, "euler", "ddim_uniform", *texts, noise, 0, STEPS, "disable"
        )
    assert (latents["samples"] - sample(patched, inversion)).abs().max() < 1e-4 * latents["samples"].std()


def test_levels_between_those_of_the_inversion_lie_on_its_ddim_steps(inversion):
    for level in range(1, STEPS + 1):
        low, high = (inversion.sigmas[i].item() for i in (level - 1, level))
        x = inversion.trajectory[level]
        assert distance(inversion.latent_at(high), x) < 1e-6
        eps = (x - inversion.trajectory[level - 1]) / (high - low)
        between = 0.3 * low + 0.7 * high
        assert distance(inversion.latent_at(between), ddim_step(x, eps, high, between)) < 1e-5
    beyond = inversion.latent_at(2 * high - low)
    assert distance(beyond, 2 * inversion.trajectory[-1] - inversion.trajectory[-2]) < 1e-5


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_other_samplers_and_schedules_are_served(model, inversion, sampler):
    sampling_of = model.get_model_object("model_sampling")
    karras = comfy.samplers.calculate_sigmas(sampling_of, "karras", 4)
    result = sample(patch(model, inversion, 0.8, 0.5), inversion, sampler=sampler, sigmas=karras)
    assert result.isfinite().all()
    assert not torch.equal(result, sample(model, inversion, sampler=sampler, sigmas=karras))


@pytest.mark.parametrize("share, level", [(0.0, None), (0.2, 5), (0.6, 3), (0.79, 2)])
def test_the_lowest_level_is_that_of_the_windows_last_step(inversion, share, level):
    lowest = inversion.lowest_sigma(share)
    active = [i for i in range(1, STEPS + 1) if inversion.sigmas[i] >= lowest]
    assert active == ([] if level is None else list(range(level, STEPS + 1)))


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize("error", [None, RuntimeError, Cancelled])
def test_nothing_stays_on_the_model(model, inversion, error):
    unet = model.model.diffusion_model
    before = sample(model, inversion)
    state = [[dict(m.__dict__["_forward_hooks"]), m.__dict__.get("forward")] for m in unet.modules()]
    options, wrappers = repr(model.model_options), repr(model.wrappers)
    patched = patch(model, inversion)
    if error is None:
        sample(patched, inversion)
    else:
        failing = patched.clone()
        calls = []

        def fail(h, hsp, transformer_options):
            calls.append(h)
            if len(calls) == 14:  # within the decoder, past the feature block
                raise error
            return h, hsp

        failing.set_model_output_block_patch(fail)
        with pytest.raises(error):
            sample(failing, inversion)
    assert [[dict(m.__dict__["_forward_hooks"]), m.__dict__.get("forward")] for m in unet.modules()] == state
    assert (repr(model.model_options), repr(model.wrappers)) == (options, wrappers)
    assert torch.equal(sample(model, inversion), before)
    assert torch.equal(sample(patched, inversion), sample(patch(model, inversion), inversion))


def test_an_inversion_of_another_model_is_refused(inversion):
    with pytest.raises(ValueError, match="inversion: it was made with another model. Connect the same model"):
        patch(small_model(seed=5), inversion)


def test_a_model_whose_layers_are_not_known_is_refused(model, inversion):
    other = model.clone()
    unet = model.model.diffusion_model
    try:
        model.model.diffusion_model = torch.nn.Linear(1, 1)
        with pytest.raises(ValueError, match="model: where Linear attends is not known here. Use a UNet"):
            patch(other, inversion)
    finally:
        model.model.diffusion_model = unet


def test_a_latent_of_another_size_is_refused(model, inversion):
    with pytest.raises(ValueError, match="latent_image: its shape is.*Connect `noise`"):
        sample(patch(model, inversion), inversion, noise=latent(width=16)["samples"])


def test_noise_on_top_of_the_inversions_noise_is_refused(model, inversion):
    patched = patch(model, inversion)
    noise = {"samples": inverted_noise(inversion, model)}
    with torch.inference_mode(), pytest.raises(ValueError, match="noise: it would be added.*DisableNoise"):
        host_nodes.KSampler().sample(
            patched, 0, STEPS, 2.0, "euler", "ddim_uniform", conditioning(), conditioning(), noise
        )
