"""What of the picture stays in a Prompt-to-Prompt edit: local blending, noise masks."""

import pytest
import torch
from pix2pix_zero.host.methods import prompt_to_prompt
from prompt_to_prompt_runs import STEPS, Trace, branch, edit, encode, invert, maps_of, patch, sample
from small_unet import latent

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")


@pytest.fixture(scope="module")
def inversion(model, clip):
    return invert(model, clip)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun", "dpmpp_2m", "dpm_2"])
def test_full_local_blend_brings_the_source_back_exactly(model, clip, inversion, sampler):
    """At threshold 1 nothing is above it, so everything stays: whatever the sampler, its last step ends on the source."""
    patched, positive = patch(model, inversion, clip, "a dog on a sofa", local_blend=1.0)
    edited = sample(patched, inversion, positive, encode(clip, ""), sampler=sampler)
    assert (edited - latent()["samples"]).abs().max() <= 1e-4 * edited.std()


@pytest.mark.parametrize("method", ["ddim", "direct"])
def test_outside_the_blend_mask_every_step_is_on_the_trajectory(model, clip, method):
    inversion = invert(model, clip, method=method)
    visited = []
    options = dict(local_blend=0.9, blend_words="cat, dog", cross=0.25)
    patched, positive = patch(model, inversion, clip, "a dog on a sofa", **options)
    edited = sample(patched, inversion, positive, encode(clip, ""), callback=lambda i, d, x, n: visited.append(x))
    latents = [(x, inversion.trajectory[STEPS - step]) for step, x in enumerate(visited)]
    latents.append((model.model.process_latent_in(edited), inversion.trajectory[0]))
    for ours, theirs in latents[2:]:  # the callback is given the latent before a step; blending starts with the second
        stays = ((ours - theirs).abs() <= 1e-5 * theirs.std()).all(1)
        assert 0 < stays.float().mean() < 1
    assert (visited[1] - inversion.trajectory[STEPS - 1]).abs().max() > 1e-3


def test_blending_starts_at_a_noise_level_whatever_the_samplers_grid(model, clip, inversion):
    """A fifth of the inversion's 4 steps is the first: a sampler with steps of its own blends from below it on."""
    visited = []
    patched, positive = patch(model, inversion, clip, "a dog on a sofa", local_blend=1.0)
    levels = inversion.sigmas.flip(0)
    sigmas = torch.cat([levels[:1], levels[:1] * 0.99995, levels[:1] * 0.9, levels[1:]])
    negative = encode(clip, "")
    sample(patched, inversion, positive, negative, sigmas=sigmas, callback=lambda i, d, x, n: visited.append(x))
    stays = [
        bool((x - inversion.latent_at(float(sigma))).abs().max() <= 1e-3 * x.std())
        for x, sigma in zip(visited[1:], sigmas[1:])
    ]
    assert stays == [True, False, True, True, True]  # the first step is too short to leave it


def test_the_inversions_noise_mask_is_kept(model, clip):
    picture = latent()
    picture["noise_mask"] = torch.zeros(1, 8, 8)
    picture["noise_mask"][..., :4] = 1.0
    edited = edit(model, invert(model, clip, picture=picture), clip, "a dog on a sofa")
    difference = (edited - picture["samples"]).abs()
    assert difference[..., 4:].max() < 1e-4
    assert difference[..., :4].mean() > 0.1


def test_steps_without_the_target_are_not_blended(model, clip, inversion):
    """A target that comes in late (ConditioningSetTimestepRange) has drawn no maps before."""
    patched, positive = patch(model, inversion, clip, "a dog on a sofa", local_blend=0.5)
    late = [[positive[0][0], {"start_percent": 0.9, "end_percent": 1.0}]]
    assert sample(patched, inversion, late, encode(clip, "")).isfinite().all()


ROOM = "in a quiet room with an old lamp and a small rug and " * 5
SHORT, LONG = "a {} on a sofa", f"{ROOM}{ROOM}a {{}} on a sofa"


def places(clip, text, word):
    """Of a word's tokens among all those of a text, read off the host's own tokenizer."""
    (wanted,) = [token for token, _ in clip.tokenize(word)["l"][0] if token not in (49406, 49407)]
    tokens = [token for row in clip.tokenize(text)["l"] for token, _ in row]
    return [i for i, token in enumerate(tokens) if token == wanted]


@pytest.fixture
def masks(monkeypatch):
    """Of the words, in the source and in the target, that are drawn while sampling."""
    kept = []

    class Kept(prompt_to_prompt.WordMask):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    monkeypatch.setattr(prompt_to_prompt, "WordMask", Kept)
    return kept


@pytest.mark.parametrize(("source", "target"), [(SHORT, LONG), (LONG, SHORT), (LONG, LONG)])
def test_the_mask_is_drawn_from_the_words_wherever_they_stand_in_texts_of_any_length(
    model, clip, masks, source, target
):
    """One chunk of 77 tokens or two, and the host repeats the negative's to as many."""
    source, target = source.format("cat"), target.format("dog")
    inversion = invert(model, clip, source)
    options = dict(source=source, cross=0.0, to_itself=0.0, local_blend=0.5, blend_words="cat, dog")
    with Trace(model) as trace:
        patched, positive = patch(trace.model, inversion, clip, target, **options)
        sample(patched, inversion, positive, encode(clip, ""))
    expected = [0, 0]
    for source_call, call in trace.steps():
        for name, layer in source_call["layers"].items():
            if name[3] != "attn2" or layer["to_q"].shape[1] != 16:  # 4x4, the level that is read
                continue
            maps = maps_of(layer["to_q"], layer["to_k"]), maps_of(*(branch(call, name, p, 0) for p in ("to_q", "to_k")))
            for i, (text, word) in enumerate(((source, "cat"), (target, "dog"))):
                expected[i] = expected[i] + maps[i][..., places(clip, text, word)].sum(-1).mean(1)
    assert len(masks) == 2
    for mask, drawn in zip(masks, expected):
        torch.testing.assert_close(mask.total.flatten(1).double(), drawn, rtol=1e-4, atol=1e-7)


def test_words_that_make_a_text_a_chunk_longer_are_found(model, clip, masks):
    source = f"{ROOM}a cat sits"
    target = f"{ROOM}a dog sits wearing one large red hat and two big green shoes on every single foot"
    inversion = invert(model, clip, source)
    patched, positive = patch(model, inversion, clip, target, source=source, local_blend=0.5)
    assert (inversion.source[0][0].shape[1], positive[0][0].shape[1]) == (77, 154)
    sample(patched, inversion, positive, encode(clip, ""))
    added = "dog large red hat two big green shoes every single foot one".split()
    assert masks[0].tokens == places(clip, source, "cat")
    assert sorted(masks[1].tokens) == sorted(place for word in added for place in places(clip, target, word))
    assert max(masks[1].tokens) > 77
