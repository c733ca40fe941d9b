"""The demo scenes: deterministic, and an edit changes what it says and nothing else."""

import random
from dataclasses import fields, replace

import numpy as np
import pytest
from PIL import Image, ImageFilter
from pix2pix_zero.demo_model.scene import FURS, STYLES, SUBJECTS, Scene, sample_scene
from pix2pix_zero.demo_model.scene_captions import caption
from pix2pix_zero.demo_model.scene_renders import render, subject_mask


def grown(mask, pixels):
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0


def differing(a, b):
    return (render(a) != render(b)).any(axis=-1)


def test_the_same_seed_draws_the_same_picture():
    assert sample_scene(12) == sample_scene(12)
    assert (render(sample_scene(12)) == render(sample_scene(12))).all()
    assert (render(sample_scene(12)) != render(sample_scene(13))).any()


def test_pictures_are_rgb_of_128_pixels():
    picture = render(sample_scene(0))
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8


@pytest.mark.parametrize("seed", range(6))
def test_fixing_a_field_changes_only_that_field(seed):
    free, fixed = sample_scene(seed), sample_scene(seed, subject="zebra")
    assert replace(free, subject="zebra") == fixed


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("subject", SUBJECTS[1:])
def test_another_subject_leaves_the_background_alone(seed, subject):
    cat = sample_scene(seed, subject="cat", style="flat")
    other = replace(cat, subject=subject)
    changed = differing(cat, other)
    assert changed.sum() > 300
    assert not changed[~grown(subject_mask(cat) | subject_mask(other), 4)].any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("subject", SUBJECTS)
def test_glasses_are_drawn_on_the_subject_only(seed, subject):
    without = sample_scene(seed, subject=subject, style="flat", glasses=False)
    wearing = replace(without, glasses=True)
    changed = differing(without, wearing)
    assert changed.sum() > 150
    assert not changed[~grown(subject_mask(wearing), 4)].any()


@pytest.mark.parametrize("change", [{"night": True}, {"winter": True}, {"style": "pencil sketch"}, {"fur": "white"}])
def test_hour_season_style_and_fur_keep_the_outline(change):
    scene = sample_scene(3, subject="dog", night=False, winter=False, style="flat", fur="black")
    assert (subject_mask(scene) == subject_mask(replace(scene, **change))).all()
    assert differing(scene, replace(scene, **change)).any()


def test_winter_leaves_the_subject_alone():
    scene = sample_scene(3, subject="dog", night=False, winter=False, style="flat")
    inside = ~grown(~subject_mask(scene), 4)
    assert not differing(scene, replace(scene, winter=True))[inside].any()


def test_the_mask_covers_the_subject_and_nothing_far_from_it():
    scene = sample_scene(5, subject="cat", style="flat")
    moved = replace(scene, x=scene.x + 0.02)
    changed = differing(scene, moved)
    assert not changed[~grown(subject_mask(scene) | subject_mask(moved), 4)].any()
    assert 0.1 < subject_mask(scene).mean() < 0.6


def test_a_word_that_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="subject: 'giraffe' is not one of cat, dog"):
        Scene(subject="giraffe")


def test_the_canonical_caption_names_everything_in_natural_english():
    scene = Scene(subject="cat", fur="orange", glasses=True, winter=False, night=False)
    assert caption(scene) == "a photo of an orange cat wearing glasses in summer during the day"
    sketch = replace(scene, style="pencil sketch", glasses=False, night=True)
    assert caption(sketch) == "a pencil sketch of a cat in summer at night"
    assert caption(replace(scene, style="oil pastel", fur="brown")).startswith("an oil pastel drawing of a brown cat")
    assert caption(replace(scene, subject="zebra")).startswith("a photo of a zebra")


def test_varied_captions_never_say_what_is_not_there():
    rng = random.Random(0)
    scene = sample_scene(1, subject="cat", fur="gray", glasses=False, winter=True, night=True, style="flat")
    texts = {caption(scene, rng) for _ in range(300)}
    assert len(texts) > 150
    said = {word for text in texts for word in text.split()}
    assert not said & {
        "dog",
        "dogs",
        "horse",
        "zebra",
        "glasses",
        "eyeglasses",
        "summer",
        "grass",
        "sunshine",
        "pencil",
        "oil",
    }
    assert not any("sunny day" in text or "during the day" in text for text in texts)
    assert said & {"cat"} and said & {"winter", "snow"} and said & {"night", "moon"}


def test_captions_draw_from_the_generator_alone():
    scene = sample_scene(1)
    assert [caption(scene, random.Random(k)) for k in range(9)] == [caption(scene, random.Random(k)) for k in range(9)]


def test_every_choice_comes_up():
    drawn = [sample_scene(seed) for seed in range(300)]
    for name, choices in (("subject", SUBJECTS), ("style", STYLES), ("fur", FURS)):
        assert {getattr(scene, name) for scene in drawn} == set(choices)
    assert len({f.name for f in fields(Scene) if len({getattr(s, f.name) for s in drawn}) > 1}) == len(fields(Scene))
