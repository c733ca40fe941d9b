import random
from itertools import product

import numpy as np
import pytest
import torch
from pix2pix_zero.demo_model import captioner_training as training
from pix2pix_zero.demo_model.scene import FURS, STYLES, SUBJECTS, Scene, sample_scene
from pix2pix_zero.demo_model.scene_captions import caption
from pix2pix_zero.demo_model.scene_renders import render


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(index) for index in range(96)]


@pytest.fixture(scope="module")
def pictures(scenes):
    return training.render_scenes(scenes)


@pytest.fixture(scope="module")
def parts():
    return training.load_parts()


def caption_words():
    """Every word that the canonical captions and the openings can hold."""
    words = set(" ".join(training.OPENINGS).split())
    for subject, fur, style, flag in product(SUBJECTS, FURS, STYLES, (False, True)):
        scene = Scene(subject=subject, fur=fur, style=style, glasses=flag, night=flag, winter=flag)
        words.update(caption(scene).split())
    return words


def test_the_vocabulary_spells_every_canonical_caption(scenes, parts):
    _, tokenizer, _ = parts
    for scene in scenes:
        ids = tokenizer(caption(scene), add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == caption(scene)
    assert caption_words() == set(tokenizer.get_vocab()) - {
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"
    }  # fmt: skip


def test_teaching_texts_split_the_canonical_caption(scenes):
    rng = random.Random(0)
    for scene in scenes:
        opening, rest = training.teaching_text(scene, rng)
        assert caption(scene).endswith(rest)
        assert f"{opening} {rest}".strip() == caption(scene) or opening in training.OPENINGS


def test_only_what_is_to_be_said_is_a_target(parts):
    _, tokenizer, _ = parts
    ids, mask, targets = training.tokenize([("a photo of", "a cat"), ("", "a dog")], tokenizer, start=5)
    said = [[tokenizer.decode(i) for i in row[row >= 0]] for row in targets]
    assert said == [["a", "cat", "[SEP]"], ["a", "dog", "[SEP]"]]
    assert ids[:, 0].tolist() == [5, 5]
    assert mask.sum(dim=1).tolist() == [7, 4]


def test_shrinking_and_normalizing_agree_with_the_image_processor(scenes, parts):
    _, _, image_processor = parts
    picture = render(scenes[0])
    expected = image_processor(images=[picture], input_data_format="channels_last", return_tensors="pt").pixel_values
    shrunk = training.shrink(torch.from_numpy(picture).movedim(-1, 0)[None] / 255, image_processor)
    got = training.normalize(shrunk, image_processor)
    assert (got - expected).abs().max() < 0.05


def test_blur_agrees_with_scipy(pictures):
    from scipy.ndimage import gaussian_filter

    image = pictures[:1].float().movedim(-1, 1)
    expected = gaussian_filter(image.numpy(), (0, 0, 1.5, 1.5), mode="nearest", truncate=2.5)
    got = training.gaussian_blur(image, 1.5).numpy()
    assert np.abs(got - expected).max() < 0.05


def test_augmented_pictures_stay_pictures(pictures):
    images = pictures[:32].float().movedim(-1, 1) / 255
    changed = training.augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert 0 <= changed.min() and changed.max() <= 1
    untouched = sum(torch.equal(a, b) for a, b in zip(changed, images))
    assert 2 <= untouched <= 16
    assert 0.01 < (changed - images).abs().mean() < 0.15


@pytest.mark.parametrize("subject", SUBJECTS)
def test_accuracy_reads_captions_word_by_word(subject):
    scene = Scene(subject=subject, fur="black", glasses=True, night=True, winter=True)
    truth = caption(scene)
    assert set(training.caption_accuracy([truth], [scene]).values()) == {1.0}
    for word, other, wrong in (
        (subject, "bird", {"subject", "exact"}),
        (" wearing glasses", "", {"glasses", "exact"}),
        ("at night", "during the day", {"night", "exact"}),
        ("in winter", "", {"winter", "exact"}),
        ("a photo of", "a pencil sketch of", {"style", "exact"}),
    ):
        shares = training.caption_accuracy([truth.replace(word, other)], [scene])
        assert {name for name, share in shares.items() if share == 0} == wrong
