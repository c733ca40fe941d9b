"""Pictures far below the model's size, and weights over the widgets' whole range: a picture, or words; never black or NaN."""

import functools

import pytest
import torch
from pix2pix_zero.demo_model.loader import load_demo_model
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return load_demo_model()


def picture(height: int, width: int) -> torch.Tensor:
    """A smooth one: [1, height, width, 3]."""
    rows, columns = torch.linspace(0.2, 0.8, height)[:, None], torch.linspace(0.8, 0.3, width)
    return torch.stack([rows.expand(height, width), columns.expand(height, width), 0.5 * (rows + columns)], -1)[None]


def text(clip, words: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(words))


@torch.inference_mode()
def invert(demo, size: tuple[int, int], weights: tuple[float, float]):
    model, clip, vae = demo
    return Pix2PixZeroInversion.execute(
        model=[model],
        positive=[text(clip, "a photo of a cat")],
        latent_image=[{"samples": vae.encode(picture(*size))}],
        steps=[3],
        seed=[0],
        autocorrelation_weight=[weights[0]],
        kl_weight=[weights[1]],
        regularization_steps=[50],
        autocorrelation_rolls=[5],
        method=["direct"],
    ).result[0]


@pytest.fixture(scope="module")
def inverted(demo):
    """`inverted(size, weights)`: the inversion, which edits with every preset leave as it is."""
    return functools.cache(lambda size, weights: invert(demo, size, weights))


@torch.inference_mode()
def edited(demo, inversion, preset: str) -> torch.Tensor:
    model, clip, vae = demo
    latent = Pix2PixZeroKSampler.execute(
        model=[model],
        inversion=inversion,
        positive=[text(clip, "a photo of a dog")],
        negative=[text(clip, "a photo of a cat")],
        cfg=[5.0],
        guidance_strength=[0.1],
        start_percent=[0.0],
        end_percent=[1.0],
        preset=[preset],
    ).result[0][0]
    return vae.decode(latent["samples"])


@pytest.mark.parametrize("preset", ["default", "official", "paper"])
@pytest.mark.parametrize("weights", [(20.0, 20.0), (1000.0, 1000.0), (1000.0, 0.0), (0.0, 1000.0)])
@pytest.mark.parametrize("size", [(16, 64), (32, 32), (40, 24)])
def test_an_edit_is_a_picture_whatever_the_weights(demo, inverted, size, weights, preset):
    drawn = edited(demo, inverted(size, weights), preset)
    assert drawn.isfinite().all()
    assert drawn.mean() > 0.1 and drawn.std() > 0.02, "one flat colour"


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((5, 7), "^pixels: a picture of 7x5 is too small, 8x8 is the least"),
        ((16, 16), "^latent_image: a picture of 16x16 is too small for this model. One side has to be longer than 16"),
    ],
)
def test_the_smallest_size_is_said_in_words(demo, size, words):
    with pytest.raises(ValueError, match=words):
        edited(demo, invert(demo, size, (20.0, 20.0)), "default")
