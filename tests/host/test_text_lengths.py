"""Guided edits whose text is longer or shorter than the inversion's caption: what both have is matched, the rest is free."""

import functools
import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from composed_run import edit, invert, same, soft_model
from guided_pass import latents
from patch_catalogue import appended_tokens
from pix2pix_zero.attention_patches.attention import cross_attention_sites
from pix2pix_zero.host.sampling import edit as edit_room
from pix2pix_zero.host.sampling.edit import PRESETS
from pix2pix_zero.host.text.conditionings import stack_conditionings
from plain_unet import PlainUNet, assert_same_gradient, guider_gradient
from small_unet import conditioning, latent

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")

LENGTHS = [(7, 14), (14, 7), (14, 21)]
STRENGTH = 0.005
LAMBDA = 1e-3


@pytest.fixture(scope="module")
def model():
    return soft_model()


def repeated(texts):
    """As the host makes a text longer: its attention's output stays as it is."""
    return [[text.repeat(1, 2, 1), options] for text, options in texts]


@pytest.mark.parametrize(("before", "after"), LENGTHS)
def test_gradient_is_that_of_the_shares_that_common_tokens_have_in_what_they_draw(model, before, after):
    x_source, x = latents(model, batch=2)
    source, positive = conditioning(tokens=before), conditioning(seed=1, tokens=after)
    ours = guider_gradient(model, positive, x_source, x, source)
    expected = PlainUNet(model).gradient(positive[0][0], x_source, x, source[0][0], min(before, after))
    assert_same_gradient(ours, expected)


@pytest.mark.parametrize(("before", "after"), LENGTHS[:2])
def test_tokens_that_another_pack_appends_are_not_taken_for_the_texts(model, before, after):
    patched = model.clone()
    patched.set_model_attn2_patch(appended_tokens)
    x_source, x = latents(model)
    source, positive = conditioning(tokens=before), conditioning(seed=1, tokens=after)
    ours = guider_gradient(patched, positive, x_source, x, source)
    plain = PlainUNet(model, patches={"attn2_patch": [appended_tokens]})
    assert_same_gradient(ours, plain.gradient(positive[0][0], x_source, x, source[0][0], min(before, after)))


def test_each_of_several_texts_is_matched_over_what_it_shares_with_its_own_counterpart(model):
    """The host calls the UNet once for both, with the shorter one repeated."""
    x_source, x = latents(model)
    source = [*conditioning(seed=3), *conditioning(seed=4, tokens=14)]
    positive = [*conditioning(seed=1, tokens=14), *conditioning(seed=2)]
    ours = guider_gradient(model, positive, x_source, x, source)
    plain = PlainUNet(model)
    parts = [plain.gradient(a, x_source, x, b, 7) for (a, _), (b, _) in zip(positive, source)]
    assert_same_gradient(ours, [sum(pair) / 2 for pair in zip(*parts)])


@pytest.mark.parametrize("longer", ["source", "positive"])
def test_a_text_that_is_only_repeated_is_matched_like_the_text(model, longer):
    x_source, x = latents(model)
    texts = {"source": conditioning(), "positive": conditioning(seed=1)}
    gradient, distance = guider_gradient(model, x_source=x_source, x=x, **texts)
    texts[longer] = repeated(texts[longer])
    assert_same_gradient(guider_gradient(model, x_source=x_source, x=x, **texts), (gradient, distance.double()))


def test_words_that_are_added_are_free_to_draw(model):
    """With one latent and one caption, nothing but added words can change the first maps."""
    x, _ = latents(model)
    first = cross_attention_sites(model.model.diffusion_model)[:1]
    ((caption, _),), ((more, _),) = conditioning(), conditioning(seed=5)
    added = [[torch.cat([caption, more], 1), {}]]
    gradient, distance = guider_gradient(model, added, x, x, sites=first)
    assert float(distance) <= 1e-9
    other_gradient, other = guider_gradient(model, conditioning(seed=1), x, x, sites=first)
    assert float(other) > 1e-3
    assert gradient.norm() <= 1e-4 * other_gradient.norm()


@pytest.fixture(scope="module")
def inverted(model):
    """`inverted(repeat)`: of the caption, or of its repetition."""
    caption = conditioning()
    return functools.cache(
        lambda repeat: invert(model, repeated(caption) if repeat else caption, latent(1, 8, 8), method="direct")
    )


@pytest.mark.parametrize(("preset", "longer"), zip(PRESETS, itertools.cycle(["source", "positive"])))
def test_every_preset_makes_the_edit_of_a_text_from_its_repetition(model, inverted, preset, longer):
    alone = PRESETS[preset].paper_step is not None

    def run(repeat, strength=10 * LAMBDA if preset == "official" else LAMBDA if alone else STRENGTH):
        inversion = inverted(repeat and longer == "source")
        positive = conditioning(seed=1)
        if repeat and longer == "positive":
            positive = repeated(positive)
        settings = edit_room.EditSettings(2.0, strength, preset=preset, local_blend=0.9, feature_until=0.5)
        changed = {preset: replace(PRESETS[preset], paper_step=strength if alone else None)}
        with torch.inference_mode(), patch.dict(PRESETS, changed):
            return edit_room.sample_edit(model, inversion, positive, conditioning(seed=9), settings)

    expected, expected_mask = run(False)
    ours, mask = run(True)
    assert same(ours, expected)
    assert not same(run(True, strength=0.0)[0], expected, 1e-3), "guidance must matter"
    if not alone:
        assert 0 < expected_mask.mean() < 1
        assert same(mask, expected_mask, 1e-3)


@pytest.mark.parametrize(("before", "after"), LENGTHS[:2])
def test_maps_kept_and_recorded_anew_and_matched_one_picture_at_a_time_give_one_edit(model, before, after, monkeypatch):
    source, positive = conditioning(tokens=before), conditioning(seed=1, tokens=after)
    picture = latent(2, 8, 8)
    inversion = invert(model, source, picture, method="direct")
    assert inversion.maps.size > 0
    kept = edit(model, inversion, positive, strength=STRENGTH)
    anew = edit(model, invert(model, source, picture, method="direct", map_memory=0), positive, strength=STRENGTH)
    assert same(anew, kept)
    assert not same(edit(model, inversion, positive), kept, 1e-2), "guidance must matter"
    monkeypatch.setattr(edit_room, "affordable_rows", lambda *args, **needs: 1)
    assert same(edit(model, inversion, positive, strength=STRENGTH), kept)


@pytest.mark.parametrize("lengths", [(7, 14), (14, 7)], ids=["edits as long", "edits of other lengths"])
def test_texts_of_a_batch_are_guided_as_if_each_came_alone(model, monkeypatch, lengths):
    """The node repeats the texts of a list to one length."""
    sources = [conditioning(seed=3), conditioning(seed=4, tokens=14)]
    edits = [conditioning(seed=seed, tokens=tokens) for seed, tokens in enumerate(lengths, start=1)]
    source, positive = (stack_conditionings(texts, "positive") for texts in (sources, edits))
    picture = latent(2, 8, 8)
    inversion = invert(model, source, picture)
    together = edit(model, inversion, positive, strength=STRENGTH)
    for i in range(2):
        one = invert(model, sources[i], {"samples": picture["samples"][i : i + 1]})
        alone = edit(model, one, edits[i], strength=STRENGTH)
        assert same(together[i : i + 1], alone)
        assert not same(edit(model, one, edits[i]), alone, 1e-2), "guidance must matter"
    monkeypatch.setattr(edit_room, "affordable_rows", lambda *args, **needs: 1)
    assert same(edit(model, inversion, positive, strength=STRENGTH), together)


def test_memory_is_estimated_for_the_longer_text(model, monkeypatch):
    announced = []
    monkeypatch.setattr(edit_room, "affordable_mode", lambda *args, tokens, **_: announced.append(tokens) or "none")
    edit(model, invert(model, conditioning(tokens=14)), conditioning(seed=1), strength=STRENGTH)
    edit(model, invert(model), conditioning(seed=1, tokens=21), strength=STRENGTH)
    assert announced == [14, 21]
