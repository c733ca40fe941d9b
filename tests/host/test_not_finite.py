"""NaN is refused where it comes in, and never leaves as a picture."""

import math

import plug_and_play_runs as plugged
import prompt_to_prompt_runs as prompted
import pytest
import torch
from pix2pix_zero.editing.directions import EditDirection
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling.reference import ReferenceSettings, generate_reference
from pix2pix_zero.nodes.attention_heatmap import Pix2PixZeroAttentionHeatmap
from pix2pix_zero.nodes.directions import Pix2PixZeroApplyDirection
from pix2pix_zero.nodes.feature_pca import Pix2PixZeroFeaturePCA
from small_edit import edit, invert
from small_unet import conditioning, latent

pytestmark = pytest.mark.usefixtures("shallow_unet")


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] = math.nan
    return tensor


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("weight", [20.0, 1000.0])
def test_no_size_and_no_weight_end_in_nan(model, size, weight):
    inversion = invert(
        model, picture=latent(1, size, size), regularization=NoiseRegularization(weight, weight, steps=50)
    )
    assert inversion.trajectory.isfinite().all()


def test_a_text_with_nan_is_named(model):
    broken = [[with_nan(conditioning()[0][0]), {}]]
    with pytest.raises(ValueError, match="positive: it contains NaN"):
        invert(model, broken)
    inversion = invert(model)
    with pytest.raises(ValueError, match="positive: it contains NaN"):
        edit(model, inversion, broken)
    with pytest.raises(ValueError, match="negative: it contains NaN"):
        edit(model, inversion, negative=broken)


def test_a_mask_with_nan_is_named(model):
    with pytest.raises(ValueError, match="latent_image: it contains NaN"):
        invert(model, picture={**latent(), "noise_mask": with_nan(torch.ones(1, 64, 64))})
    with pytest.raises(ValueError, match="mask: it contains NaN"):
        edit(model, invert(model), mask=with_nan(torch.ones(1, 64, 64)))


@pytest.mark.parametrize("knob", ["autocorrelation_weight", "kl_weight"])
def test_a_weight_that_is_no_number_is_named(model, knob):
    with pytest.raises(ValueError, match=f"{knob}: nan is not a number"):
        invert(model, regularization=NoiseRegularization(**{knob: math.nan}))


@pytest.mark.parametrize("knob", ["cfg", "local_blend", "feature_until"])
def test_a_knob_of_the_edit_that_is_no_number_is_named(model, knob):
    with pytest.raises(ValueError, match=f"{knob}: nan is not a number"):
        edit(model, invert(model), **{knob: math.nan})


def test_what_a_patch_of_the_model_breaks_is_no_success(model):
    broken = model.clone()
    broken.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * math.nan)
    with pytest.raises(ValueError, match="model: .*NaN"):
        invert(broken)
    with pytest.raises(ValueError, match="model: .*NaN"):
        edit(broken, invert(model))


def broken_late(model):
    """Its last step is NaN, as a LoRA in fp16 makes some."""
    broken = model.clone()
    broken.set_model_sampler_post_cfg_function(
        lambda args: args["denoised"] * (math.nan if args["sigma"].max() < 1.0 else 1.0)
    )
    return broken


def test_what_a_patch_breaks_is_no_success_of_a_stock_sampler_with_our_edits(model, clip):
    inversion = prompted.invert(model, clip)
    patched, positive = prompted.patch(broken_late(model), inversion, clip, "a dog on a sofa")
    with pytest.raises(ValueError, match="model: .*NaN"):
        prompted.sample(patched, inversion, positive, prompted.encode(clip, ""))
    with pytest.raises(ValueError, match="model: .*NaN"):
        plugged.sample(plugged.patch(broken_late(model), inversion), inversion)


def test_what_a_patch_breaks_in_attention_is_no_picture_of_it(model, clip, run_node):
    inversion = prompted.invert(model, clip)
    broken = model.clone()
    broken.set_model_attn2_patch(lambda q, k, v, options: (q * math.nan, k, v))
    window = {"start_percent": [0.0], "end_percent": [1.0], "resolution": ["all"]}
    with pytest.raises(ValueError, match="model: .*NaN"):
        run_node(
            Pix2PixZeroAttentionHeatmap,
            **{"model": [broken], "inversion": [inversion], "clip": [clip]},
            **{"caption": [prompted.SOURCE], "words": ["cat"], **window},
        )
    with pytest.raises(ValueError, match="model: .*NaN"):
        run_node(Pix2PixZeroFeaturePCA, model=broken, inversion=inversion, features="queries", percent=0.5)


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.5, 1.0)])
def test_a_caption_that_is_silent_for_a_part_of_the_sampling_is_refused(model, window):
    limited = [[conditioning()[0][0], {"start_percent": window[0], "end_percent": window[1]}]]
    with pytest.raises(ValueError, match="positive: it is limited to a part of the sampling"):
        invert(model, limited)


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("socket", ["positive", "negative"])
def test_texts_of_an_edit_and_of_a_reference_are_not_silent_either(model, socket, window):
    """The host draws a text that says nothing as a grey picture."""
    limited = [[conditioning(seed=1)[0][0], {"start_percent": window[0], "end_percent": window[1]}]]
    texts = {"positive": conditioning(seed=1), "negative": conditioning(), socket: limited}
    with pytest.raises(ValueError, match=f"{socket}: it is limited to a part of the sampling"):
        edit(model, invert(model), **texts)
    with pytest.raises(ValueError, match=f"{socket}: it is limited to a part of the sampling"):
        generate_reference(model, **texts, latent_image=latent(), settings=ReferenceSettings(steps=3, cfg=2.0))


def test_a_negative_that_is_not_drawn_may_be_limited(model):
    inversion = invert(model)
    limited = [[conditioning()[0][0], {"end_percent": 0.5}]]
    assert torch.equal(edit(model, inversion, negative=limited, cfg=1.0), edit(model, inversion, cfg=1.0))


def test_a_latent_that_is_no_picture_is_not_the_models_fault(model):
    """Its squares overflow in the UNet's normalizations."""
    with pytest.raises(ValueError, match=r"^latent_image: its values reach 1.0e\+20"):
        invert(model, picture={"samples": 1e20 * torch.ones(1, 4, 8, 8)})


def test_captions_that_cover_the_sampling_together_are_taken(model):
    halves = [
        [conditioning(seed=seed)[0][0], {"start_percent": start, "end_percent": start + 0.5}]
        for seed, start in ((1, 0.0), (2, 0.5))
    ]
    assert invert(model, halves).trajectory.isfinite().all()


def test_a_direction_needs_a_text_to_move():
    direction = EditDirection({"cond": torch.ones(1, 4, 3)}, "encoder", "cat", "dog", 1)
    with pytest.raises(ValueError, match="conditioning: .*no text"):
        Pix2PixZeroApplyDirection.execute([[None, {}]], direction, 1.0)
    with pytest.raises(ValueError, match="conditioning: it is empty"):
        Pix2PixZeroApplyDirection.execute([], direction, 1.0)
