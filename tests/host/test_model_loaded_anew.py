"""An inversion outlives the model object it was made with: ComfyUI may drop the loader and load the file again."""

import functools
import gc

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from patch_catalogue import merged_lora
from pix2pix_zero.host.sampling.checks import model_identity
from pix2pix_zero.host.text.text_encoding import encoder_fingerprint
from pix2pix_zero.nodes.feature_pca import Pix2PixZeroFeaturePCA
from pix2pix_zero.nodes.noise_report import Pix2PixZeroNoiseReport
from small_edit import edit, invert
from small_unet import small_model

pytestmark = pytest.mark.usefixtures("narrow_unet")


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


def test_the_weights_are_listed_twice_at_most(inversion, clip, monkeypatch):
    """It takes a large model 20 milliseconds each time, and every node asks."""
    model, lists = loaded(), []
    listed = ModelPatcher.model_state_dict
    monkeypatch.setattr(ModelPatcher, "model_state_dict", lambda *given: lists.append(given) or listed(*given))
    assert inversion.identity.is_of(model_identity(model))
    assert len(lists) == 2
    encoder_fingerprint(clip)
    assert len(lists) == 4


@pytest.fixture(scope="module")
def of_a_file():
    """`of_a_file(seed, dtype)`: a model of a file in half precision, loaded in that one. `again`: anew."""

    @functools.cache
    @torch.inference_mode()
    def load(seed, dtype, again=False):
        model = small_model(seed=seed)
        model.model.diffusion_model.half().to(dtype)
        return model

    return load


@pytest.mark.parametrize("first", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("then", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_same_weights_in_another_precision_are_the_same_model(of_a_file, first, then):
    """Whichever of both is the coarser one."""
    file, again, other = of_a_file(0, first), of_a_file(0, then, again=True), of_a_file(5, then)
    assert model_identity(file).is_of(model_identity(again))
    assert model_identity(again).is_of(model_identity(file))
    assert not model_identity(file).is_of(model_identity(other))


@pytest.mark.parametrize("then", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_model_trained_on_is_another_model(then):
    """Of weights that lie a tenth of their spread away, or of another attention layer alone."""
    with torch.inference_mode():
        file, tuned, merged = (small_model() for _ in range(3))
        for weight in tuned.model.diffusion_model.parameters():
            weight.add_(0.1 * weight.std(correction=0) * torch.randn(weight.shape))
        name = next(iter(model_identity(file).weights))
        weight = merged.model.state_dict()[name]
        weight.add_(0.1 * torch.randn(weight.shape))
        for model in (tuned, merged):
            model.model.diffusion_model.to(then)
    assert not model_identity(file).is_of(model_identity(tuned))
    assert not model_identity(file).is_of(model_identity(merged))


def test_an_inversion_goes_on_with_its_model_in_another_precision(inversion):
    again = loaded(weight_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert edit(again, inversion).isfinite().all()


def test_a_lora_on_it_leaves_it_the_same(inversion):
    assert edit(merged_lora(loaded()), inversion).isfinite().all()


def test_other_weights_are_another_model(inversion):
    with pytest.raises(ValueError, match="inversion: it was made with another model"):
        edit(loaded(seed=5), inversion)


def test_the_noise_is_reported_without_its_model(inversion, run_node):
    latent = {"samples": inversion.trajectory[-1] / 0.18215}
    _, report = run_node(Pix2PixZeroNoiseReport, noise=latent, inversion=inversion)
    assert "As the model sees it." in report
