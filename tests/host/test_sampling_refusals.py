"""What inversion and guided sampler refuse, in words that say which socket and what to do."""

import comfy.model_base
import pytest
import torch
from small_edit import edit, invert
from small_unet import conditioning, latent, small_model


@pytest.mark.parametrize("steps", [0, 1001, -3])
def test_steps_out_of_range_are_refused(model, steps):
    with pytest.raises(ValueError, match="steps"):
        invert(model, steps=steps)


def test_nan_latent_is_refused(model):
    picture = latent()
    picture["samples"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="latent_image.*NaN"):
        invert(model, picture=picture)


@pytest.mark.parametrize("empty", [{}, {"samples": torch.zeros(0, 4, 8, 8)}])
def test_a_latent_without_pictures_is_refused(model, empty):
    with pytest.raises(ValueError, match="latent_image: it holds no picture"):
        invert(model, picture={"noise_mask": None, **empty})


def test_latent_of_another_kind_is_refused(model):
    with pytest.raises(ValueError, match="latent_image.*VAE"):
        invert(model, picture={"samples": torch.randn(1, 16, 8, 8)})


def test_inversion_of_another_model_is_refused(model):
    inversion = invert(model)
    with torch.inference_mode():
        other = small_model(seed=5)
    with pytest.raises(ValueError, match="inversion.*another model"):
        edit(other, inversion)


def test_texts_that_do_not_match_the_batch_are_refused(model):
    with pytest.raises(ValueError, match="positive.*3 texts for 2 pictures"):
        invert(model, conditioning(rows=3), latent(batch=2))
    inversion = invert(model, picture=latent(batch=2))
    with pytest.raises(ValueError, match="negative.*3 texts for 2 pictures"):
        edit(model, inversion, negative=conditioning(rows=3))


def test_edm_models_are_refused():
    with pytest.raises(ValueError, match="^model: this one is an EDM model.*Use a model"):
        invert(small_model(comfy.model_base.ModelType.EDM))


def test_a_flow_model_asks_for_a_grid_that_begins_at_its_noise():
    with pytest.raises(ValueError, match="^scheduler: ddim_uniform does not begin at the noise.*Choose simple"):
        invert(small_model(comfy.model_base.ModelType.FLOW), scheduler="ddim_uniform")
