"""Guided edits whose texts carry more than a text: areas, masks, time ranges, ControlNets, hooks, several parts."""

from dataclasses import replace

import comfy.hooks
import comfy.ldm.modules.attention as attention
import comfy.samplers
import pytest
import torch
from composed_run import edit, guided_step, invert, same, soft_model
from guided_pass import latents
from patch_catalogue import (
    combined,
    control_net,
    gligen,
    lora_hooks,
    masked,
    regional,
    unequal,
    with_extras,
)
from small_unet import conditioning

import nodes as core

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")

STRENGTH = 0.005


@pytest.fixture(scope="module")
def model():
    return soft_model()


def kept_and_anew(model, source, *texts, **options):
    """The edit with maps kept from the inversion, and with maps recorded at each step."""
    return [
        edit(model, invert(model, source, **memory), *texts, strength=STRENGTH, **options)
        for memory in ({}, {"map_memory": 0})
    ]


@pytest.mark.parametrize("patch", [regional, masked, combined, unequal])
def test_maps_kept_of_several_texts_give_the_edit_of_maps_recorded_anew(model, patch):
    source, positive = (patch(conditioning(seed=seed), "positive") for seed in (0, 1))
    kept, anew = kept_and_anew(model, source, positive)
    assert same(kept, anew)
    assert not same(kept, edit(model, invert(model, source), positive), 1e-2), "guidance must matter"


def test_a_text_combined_with_itself_is_guided_like_the_text(model):
    once = edit(model, invert(model), strength=STRENGTH)
    source, positive = conditioning() * 2, conditioning(seed=1) * 2
    assert same(edit(model, invert(model, source), positive, strength=STRENGTH), once)


def test_texts_of_unequal_length_match_whether_or_not_the_host_batches_them(model, monkeypatch):
    """The host repeats the shorter text in a batch, and calls the UNet for each where memory is short."""
    source, positive = (unequal(conditioning(seed=seed), "positive") for seed in (0, 1))
    texts = source, positive, conditioning(seed=9)
    x_source, x = latents(model)
    _, estimate, gradient, distance = guided_step(model, texts, x_source, x)
    inversion = invert(model, source)
    edited = edit(model, inversion, positive, strength=STRENGTH)
    batches = []
    with monkeypatch.context() as patch:
        calls = comfy.samplers.can_concat_cond
        patch.setattr(comfy.samplers, "can_concat_cond", lambda a, b: batches.append(calls(a, b)) or a is b)
        _, apart_estimate, apart_gradient, apart_distance = guided_step(model, texts, x_source, x)
        apart = edit(model, inversion, positive, strength=STRENGTH)
    assert batches.count(True) > batches.count(False)
    assert (apart_estimate - estimate).norm() <= 1e-5 * estimate.norm()
    assert (apart_gradient - gradient).norm() <= 1e-4 * gradient.norm()
    torch.testing.assert_close(apart_distance, distance, rtol=1e-4, atol=0)
    assert same(apart, edited)


def test_a_controlnet_of_the_edit_does_not_reach_the_source(model):
    """The host would hand it on, but the source was inverted without it."""
    positive = with_extras(control_net(conditioning(seed=1), "positive"), control_apply_to_uncond=True)
    kept, anew = kept_and_anew(model, conditioning(), positive)
    assert same(kept, anew)
    assert not same(kept, edit(model, invert(model), strength=STRENGTH), 1e-2), "the ControlNet must matter"


def test_an_area_of_the_negative_alone_is_no_matter(model):
    negative = regional(conditioning(seed=9), "negative")
    kept, anew = kept_and_anew(model, conditioning(), conditioning(seed=1), negative)
    assert same(kept, anew)
    assert not same(kept, edit(model, invert(model), strength=STRENGTH), 1e-3)


def test_other_areas_than_the_captions_are_refused_in_words(model):
    source, positive = regional(conditioning(), ""), regional(conditioning(seed=1), "")
    positive[1][1]["area"] = (6, 6, 0, 2)
    with pytest.raises(ValueError, match="positive: its parts are limited to other areas"):
        edit(model, invert(model, source), positive, strength=STRENGTH)


def ranged(texts, start, end):
    return core.ConditioningSetTimestepRange().set_range(texts, start, end)[0]


def test_steps_in_which_the_sources_text_is_inactive_are_not_guided(model):
    """It ends ahead of the last of two steps; the edit's covers the whole sampling."""
    inversion, positive = invert(model, steps=2), conditioning(seed=1)
    inversion = replace(inversion, source=ranged(inversion.source, 0.0, 0.6), maps=None)
    sampling = model.get_model_object("model_sampling")
    assert inversion.sigmas[1] < sampling.percent_to_sigma(0.6) < inversion.sigmas[2]
    whole, first = (edit(model, inversion, positive, strength=STRENGTH, window=window) for window in ((0, 1), (0, 0.6)))
    assert same(whole, first)
    assert not same(whole, edit(model, inversion, positive), 1e-3), "the first step is guided"


def test_a_scheduled_lora_acts_in_the_inversion_as_in_the_edit(model):
    """The host moves on in a schedule as noise sinks; an inversion goes the other way."""
    hooks = lora_hooks((1.0, 0.0), (0.3, 0.4), (0.0, 0.8))
    source = comfy.hooks.set_hooks_for_conditioning(conditioning(), hooks)
    inversion = invert(model, source, steps=6, method="direct")
    again = edit(model, inversion, source, source)
    picture = inversion.trajectory[0] / model.model.latent_format.scale_factor
    assert same(again, picture)
    edited = comfy.hooks.set_hooks_for_conditioning(conditioning(seed=1), hooks)
    kept, anew = kept_and_anew(model, source, edited, source, cfg=1.0)
    assert same(kept, anew)
    plain = invert(model, steps=6, method="direct")
    assert not same(plain.trajectory[-1], inversion.trajectory[-1], 1e-2), "the LoRA must matter"


def test_gligen_whose_attention_has_no_derivative_is_refused_in_words(model, monkeypatch):
    """It takes the attention that ComfyUI was started with, such as SageAttention."""
    source, positive = (gligen(conditioning(seed=seed), "positive") for seed in (0, 1))
    inversion = invert(model, source)

    def sage(q, k, v, heads, **options):
        with torch.no_grad():
            return attention.attention_pytorch(q, k, v, heads)

    monkeypatch.setattr(attention, "optimized_attention", sage)
    with pytest.raises(ValueError, match="model: the attention that another node put into it has no derivative"):
        edit(model, inversion, positive, strength=STRENGTH)
