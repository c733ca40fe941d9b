"""What Prompt-to-Prompt refuses, in words that say which socket and what to do."""

from dataclasses import replace

import pytest
import torch
from pix2pix_zero.host import running
from pix2pix_zero.host.sampling.invert import inverted_noise
from prompt_to_prompt_runs import SOURCE, encode, invert, patch, sample
from small_unet import latent, small_model
from tiny_clip import tiny_clip

import nodes as host_nodes


@pytest.fixture(scope="module")
def inversion(model, clip):
    return invert(model, clip)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(target="  "), "target: it is empty"),
        (dict(source=""), "source: it is empty"),
        (dict(source="a cat, " * 40), "source: it is 154 tokens long, but the text of the inversion 77"),
        (dict(reweight="horse: 2"), "reweight: 'horse' does not occur in target"),
        (dict(reweight="dog 2"), "reweight: 'dog 2' is not of the form"),
        (dict(reweight="dog: nan"), "reweight: 'dog: nan' is not of the form"),
        (dict(local_blend=0.3, blend_words="horse"), "blend_words: 'horse' does not occur in source or target"),
        (dict(target=SOURCE, local_blend=0.3), "local_blend: source and target are the same"),
    ],
)
def test_texts_that_do_not_fit_are_refused_in_words(model, clip, inversion, changes, message):
    with pytest.raises(ValueError, match=message):
        patch(model, inversion, clip, **{"target": "a dog on a sofa", **changes})


def test_other_models_and_parts_are_refused(model, clip, inversion):
    with torch.inference_mode():
        other = small_model(seed=5)
    with pytest.raises(ValueError, match="inversion: .*another model"):
        patch(other, inversion, clip, "a dog")
    patched, _ = patch(model, inversion, clip, "a dog on a sofa")
    with pytest.raises(ValueError, match="model: it has a Prompt-to-Prompt edit already"):
        patch(patched, inversion, clip, "a dog on a sofa")
    two = replace(inversion, source=inversion.source * 2)
    with pytest.raises(ValueError, match="inversion: its caption has 2 parts"):
        patch(model, two, clip, "a dog on a sofa")
    with pytest.raises(ValueError, match="clip: it does not belong"):
        patch(model, inversion, tiny_clip("sdxl"), "a dog on a sofa")


def test_sampling_that_does_not_fit_is_refused_in_words(model, clip, inversion):
    patched, positive = patch(model, inversion, clip, "a dog on a sofa")
    long = encode(clip, "a dog, " * 40)
    with pytest.raises(ValueError, match="positive: it is not the target text, which has 77 tokens"):
        sample(patched, inversion, long, encode(clip, ""))
    wide = invert(model, clip, picture=latent(1, 8, 16))
    with pytest.raises(ValueError, match=r"latent_image: its shape is \(1, 4, 8, 16\)"):
        sample(patched, wide, positive, encode(clip, ""))
    area = [[positive[0][0], {**positive[0][1], "area": (4, 4, 0, 0)}]]
    with pytest.raises(ValueError, match="positive: .*area"):
        sample(patched, inversion, area, encode(clip, ""))
    with pytest.raises(ValueError, match="model: a Prompt-to-Prompt edit is sampled with the stock KSampler"):
        invert(patched, clip)


def test_another_source_text_is_told_on_the_node_and_in_the_log(model, clip, inversion, caplog, monkeypatch):
    shown = []
    monkeypatch.setattr(running, "show", shown.append)
    patch(model, inversion, clip, "a dog on a sofa", source="a horse in a field")
    assert "not the one that the picture was inverted with" in caplog.text
    assert ["not the one" in text for text in shown] == [True]
    caplog.clear()
    patch(model, inversion, clip, "a dog on a sofa")
    assert not caplog.records


def test_noise_on_top_of_the_inversions_noise_is_refused(model, clip, inversion):
    patched, positive = patch(model, inversion, clip, "a dog on a sofa")
    noise = {"samples": inverted_noise(inversion, model)}
    with torch.inference_mode(), pytest.raises(ValueError, match="noise: it would be added.*DisableNoise"):
        host_nodes.KSampler().sample(patched, 0, 4, 2.0, "euler", "ddim_uniform", positive, positive, noise)


@pytest.mark.parametrize(
    ("limit", "message"),
    [(dict(area=(4, 4, 0, 0)), "area"), (dict(start_percent=0.9, end_percent=1.0), "part of the sampling")],
)
def test_a_caption_that_does_not_cover_the_picture_is_refused(model, clip, inversion, limit, message):
    limited = replace(inversion, source=[[inversion.source[0][0], limit]])
    patched, _ = patch(model, limited, clip, "a dog on a sofa")
    with pytest.raises(ValueError, match=f"inversion: its caption is limited to .*{message}"):
        sample(patched, limited, encode(clip, "a dog on a sofa"), encode(clip, ""))


def test_a_model_without_text_encoder_is_told(model, inversion):
    with pytest.raises(ValueError, match="clip: there is none"):
        patch(model, inversion, None, "a dog")
