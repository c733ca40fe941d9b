"""An inversion outlives the model object it was made with: ComfyUI may drop the loader and load the file again."""

import gc

import pytest
import torch
from patch_catalogue import merged_lora
from pix2pix_zero.nodes.feature_pca import Pix2PixZeroFeaturePCA
from pix2pix_zero.nodes.noise_report import Pix2PixZeroNoiseReport
from small_edit import edit, invert
from small_unet import small_model


def loaded(**options):
    with torch.inference_mode():
        return small_model(**options)


@pytest.fixture(scope="module")
def inversion():
    """Of a model that is gone."""
    inversion = invert(loaded())
    gc.collect()
    return inversion


def test_the_same_weights_are_the_same_model(inversion, run_node):
    again = loaded()
    assert inversion.model() is not again.model
    expected = edit(again, invert(again, map_memory=0))
    assert (edit(again, inversion) - expected).abs().max() <= 1e-5 * expected.std()
    run_node(Pix2PixZeroFeaturePCA, model=again, inversion=inversion, features="queries", percent=0.5)


def test_a_lora_on_it_leaves_it_the_same(inversion):
    assert edit(merged_lora(loaded()), inversion).isfinite().all()


def test_other_weights_are_another_model(inversion):
    with pytest.raises(ValueError, match="inversion: it was made with another model"):
        edit(loaded(seed=5), inversion)


def test_the_noise_is_reported_without_its_model(inversion, run_node):
    latent = {"samples": inversion.trajectory[-1] / 0.18215}
    _, report = run_node(Pix2PixZeroNoiseReport, noise=latent, inversion=inversion)
    assert "As the model sees it." in report
