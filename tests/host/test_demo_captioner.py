"""The demo's own captioner, with the weights that ship, on scenes that it was not trained on."""

import numpy as np
import pytest
import torch
from pix2pix_zero.demo_model.captioner_training import (
    HELD_OUT_SEED,
    caption_accuracy,
    gaussian_blur,
    render_scenes,
    train_captioner,
)
from pix2pix_zero.demo_model.scene import ATTRIBUTES, sample_scene
from pix2pix_zero.demo_model.scene_captions import caption
from pix2pix_zero.nodes.caption import Pix2PixZeroCaption, Pix2PixZeroLoadCaptioner

COUNT = 60


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(HELD_OUT_SEED + 10_000 + index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def pictures(scenes):
    return render_scenes(scenes).float() / 255


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return Pix2PixZeroLoadCaptioner.execute("demo", False).result[0]


def assert_accurate(captions, scenes):
    shares = caption_accuracy(captions, scenes)
    assert shares["subject"] >= 0.98, shares
    assert all(shares[name] >= 0.9 for name in ATTRIBUTES), shares


def test_names_the_subject_and_every_attribute(demo, scenes, pictures, run_node):
    (captions,) = run_node(Pix2PixZeroCaption, captioner=demo, image=pictures)
    assert_accurate(captions, scenes)


def test_sees_through_the_blur_of_an_autoencoder(demo, scenes, pictures, run_node):
    blurred = gaussian_blur(pictures.movedim(-1, 1), 1.2).movedim(1, -1)
    (captions,) = run_node(Pix2PixZeroCaption, captioner=demo, image=blurred)
    assert_accurate(captions, scenes)


def test_goes_on_from_a_prefix(demo, scenes, pictures, run_node):
    (captions,) = run_node(Pix2PixZeroCaption, captioner=demo, image=pictures[:16], prefix="there is")
    assert all(text.startswith("there is a") for text in captions)
    subjects = [scene.subject in text.split() for text, scene in zip(captions, scenes)]
    assert sum(subjects) >= 15


def test_speaks_the_canonical_caption_grammar(demo, scenes, pictures, run_node):
    (captions,) = run_node(Pix2PixZeroCaption, captioner=demo, image=pictures[:20])
    grammar = {" ".join(caption(scene).split()[:2]) for scene in scenes}
    assert {" ".join(text.split()[:2]) for text in captions} <= grammar


def test_loss_falls_in_a_short_run_and_the_seed_fixes_it():
    scenes = [sample_scene(index) for index in range(64)]
    pictures = render_scenes(scenes)
    weights, losses = train_captioner(pictures, scenes, steps=12, batch=8, seed=3)
    again, again_losses = train_captioner(pictures, scenes, steps=12, batch=8, seed=3)
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    assert losses == again_losses
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert sum(value.numel() * value.element_size() for value in weights.values()) <= 3e6
