"""Every flow model that is no UNet: inversion, edits, FlowEdit and references, on small networks of each family."""

from dataclasses import replace

import comfy.sample
import pytest
import torch
from flow_families import FAMILIES, picture, small_family, texts
from pix2pix_zero.attention_patches import joint
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host import running
from pix2pix_zero.host.messages import NO_UNET
from pix2pix_zero.host.sampling.checks import pixels_per_latent
from pix2pix_zero.host.sampling.edit import FEATURE_UNTIL, EditSettings, sample_edit
from pix2pix_zero.host.sampling.flow_edit import FlowEditing, flow_edit_latent
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.host.sampling.reference import ReferenceSettings, generate_reference
from pix2pix_zero.host.text.conditionings import stack_conditionings

STEPS = 4
UNREGULARIZED = NoiseRegularization(0.0, 0.0, 0, 0)
NAMES = [name for name, family in FAMILIES.items() if family.known]
PLAIN = EditSettings(3.0, 0.0)


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    """(name, MODEL)"""
    with torch.inference_mode():
        return request.param, small_family(request.param)


@pytest.fixture
def sd3():
    with torch.inference_mode():
        return "SD 3", small_family("SD 3")


def inverted(family, method="direct", text=None, **changes):
    name, model = family
    settings = replace(InversionSettings(STEPS, method=method), **changes)
    return invert_latent(model, texts(name, 1) if text is None else text, picture(model), settings)


def distance(samples, clean):
    return float((samples - clean).abs().max())


@pytest.mark.works("Invert Picture", "KSampler", family=FAMILIES)
@pytest.mark.parametrize("method", ["direct", "aligned"])
@torch.inference_mode()
def test_the_unedited_picture_comes_back_exactly_and_an_edited_one_does_not(family, method):
    name, model = family
    inversion, source, clean = inverted(family, method), texts(name, 1), picture(model)["samples"]
    unedited, area = sample_edit(model, inversion, source, source, PLAIN)
    ratio = pixels_per_latent(model)
    assert unedited.shape == clean.shape and area.shape == (1, *(ratio * side for side in clean.shape[-2:]))
    # Aligned steps read the velocity at levels as low as the first, where it is as exact as the latent's last digit over sigma.
    rounding = 5e-7 * inversion.trajectory.abs().max() / inversion.sigmas[1] if method == "aligned" else 0.0
    assert distance(unedited, clean) <= max(1e-4 * clean.std(), rounding)
    edited, _ = sample_edit(model, inversion, texts(name, 2), source, PLAIN)
    assert edited.isfinite().all() and distance(edited, clean) > 1e-3


@torch.inference_mode()
def test_an_aligned_inversion_corrects_only_its_last_step_if_nothing_is_regularized(family):
    inversion, direct = (inverted(family, method, regularization=UNREGULARIZED) for method in ("aligned", "direct"))
    rounding = 1e-7 * inversion.trajectory.abs().max() / inversion.sigmas[1]  # of the velocity where it is least exact
    assert inversion.residuals[1:].abs().max() <= rounding < direct.residuals[1:].abs().max()


@torch.inference_mode()
def test_a_solved_inversion_gives_the_picture_back_without_correction(family):
    settings = {"fixed_point_iterations": 8, "regularization": UNREGULARIZED, "measure_reconstruction": True}
    assert float(inverted(family, "fixed-point", **settings).reconstruction_psnr) >= 50


@torch.inference_mode()
def test_mask_and_local_blend_keep_the_picture_outside(family):
    name, model = family
    clean, source = picture(model)["samples"], texts(name, 1)
    mask = torch.zeros(1, *clean.shape[-2:])
    mask[..., :6] = 1.0
    edited, area = sample_edit(
        model, inverted(family), texts(name, 2), source, replace(PLAIN, local_blend=0.5, mask=mask)
    )
    assert distance(edited[..., 6:], clean[..., 6:]) <= 1e-4
    assert area.max() > 0.1 and area[..., -pixels_per_latent(model) :].max() == 0
    assert distance(edited[..., :6], clean[..., :6]) > 1e-4


@pytest.mark.works("FlowEdit", family=FAMILIES)
@torch.inference_mode()
def test_flow_edit_moves_the_picture_along_another_text_only(family):
    name, model = family
    clean = picture(model)["samples"]
    settings = FlowEditing(steps=3, cfg=2.0, local_blend=0.0)
    same, edited = (
        flow_edit_latent(model, texts(name, 1), texts(name, seed), None, picture(model), settings)[0] for seed in (1, 2)
    )
    assert edited.shape == clean.shape
    assert distance(same, clean) <= 1e-4 and distance(edited, clean) > 1e-4


@pytest.mark.works("Generate Reference", family=FAMILIES)
@torch.inference_mode()
def test_a_generated_reference_is_drawn_again_from_its_trajectory(family):
    name, model = family
    positive, negative = texts(name, 1), texts(name, 2)
    reference, drawn = generate_reference(model, positive, negative, picture(model), ReferenceSettings(3, 2.0, seed=5))
    again, _ = sample_edit(model, reference, positive, negative, replace(PLAIN, cfg=2.0))
    assert drawn.shape == picture(model)["samples"].shape
    assert distance(again, drawn) <= 1e-4


@torch.inference_mode()
def test_weights_patches_and_a_stock_sampler_stay_as_they_were(family):
    name, model = family
    text, latent = texts(name, 1), picture(model)["samples"]

    def stock():
        noise = comfy.sample.prepare_noise(latent, 3)
        return comfy.sample.sample(model, noise, 2, 1.0, "euler", "simple", text, text, latent, seed=3)

    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    drawn, options = stock(), repr(model.model_options)
    sample_edit(model, inverted(family, steps=2), texts(name, 2), text, PLAIN)
    assert torch.equal(stock(), drawn) and repr(model.model_options) == options
    assert all(torch.equal(weight, before[key]) for key, weight in model.model.state_dict().items())


@torch.inference_mode()
def test_batches_equal_single_runs(sd3):
    name, model = sd3
    both = {"samples": torch.cat([picture(model, seed=seed)["samples"] for seed in (3, 4)])}
    settings = InversionSettings(STEPS, method="aligned")
    batch, single = (invert_latent(model, texts(name, 1), latent, settings) for latent in (both, picture(model)))
    edits = [sample_edit(model, inversion, texts(name, 2), texts(name, 1), PLAIN)[0] for inversion in (batch, single)]
    assert distance(edits[0][:1], edits[1]) <= 1e-4


@torch.inference_mode()
def test_features_of_a_unet_are_said_as_a_default_and_refused_as_a_wish(sd3, monkeypatch):
    name, model = sd3
    said = []
    monkeypatch.setattr(running, "show", said.append)
    inversion, source = inverted(sd3), texts(name, 1)
    usual = replace(PLAIN, feature_until=FEATURE_UNTIL)
    edited, _ = sample_edit(model, inversion, texts(name, 2), source, usual)
    assert said[-1] == NO_UNET
    assert torch.equal(edited, sample_edit(model, inversion, texts(name, 2), source, PLAIN)[0])
    assert said[-1] != NO_UNET
    with pytest.raises(ValueError, match="^feature_until: 0.8 needs the decoder of a UNet"):
        sample_edit(model, inversion, source, source, replace(PLAIN, feature_until=0.8))


@torch.inference_mode()
def test_guidance_is_refused_where_a_models_attention_is_not_known(sd3, monkeypatch):
    model, source = sd3[1], texts("SD 3", 1)
    inversion = inverted(sd3)
    monkeypatch.delitem(joint.FAMILIES, "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper")
    for knob, value in (("guidance_strength", 0.3), ("preset", "paper")):
        with pytest.raises(ValueError, match=f"^{knob}: where OpenAISignatureMMDITWrapper reads the text is not known"):
            sample_edit(model, inversion, source, source, replace(PLAIN, **{knob: value}))


@torch.inference_mode()
def test_a_step_distilled_model_names_its_base(monkeypatch):
    said = []
    monkeypatch.setattr(running, "show", said.append)
    model = small_family("Flux schnell")
    inversion, source = inverted(("Flux schnell", model)), texts("Flux schnell", 1)
    sample_edit(model, inversion, source, source, PLAIN)
    assert said[-1].endswith("Use its base model: FLUX.1 dev.")
    model = small_family("SD 3")
    for loaded, base in (("sd3.5_large.safetensors", None), ("sd3.5_large_turbo.safetensors", "SD 3.5 Large")):
        model.cached_patcher_init = (print, (f"models/{loaded}",))
        sample_edit(model, inverted(("SD 3", model)), *[texts("SD 3", 1)] * 2, PLAIN)
        assert said[-1].endswith(f"Use its base model: {base}.") == (base is not None)


@torch.inference_mode()
def test_guidance_is_taken_from_the_conditioning():
    model = small_family("Flux dev")
    ends = [inverted(("Flux dev", model), text=texts("Flux dev", 1, guidance=value)) for value in (1.0, 4.0)]
    assert distance(ends[0].trajectory[-1], ends[1].trajectory[-1]) > 1e-4


@pytest.mark.parametrize("name", ["Flux dev", "Qwen-Image"])
@torch.inference_mode()
def test_references_of_the_caption_hold_for_an_edit_without_its_own(name):
    model = small_family(name)
    shown = {"reference_latents": [picture(model, seed=9)["samples"]]}
    caption, bare = texts(name, 1, **shown), texts(name, 1)
    inversion, clean = inverted((name, model), text=caption), picture(model)["samples"]
    assert distance(sample_edit(model, inversion, bare, bare, PLAIN)[0], clean) <= 1e-4
    without = inverted((name, model), text=bare)
    assert distance(inversion.trajectory[-1], without.trajectory[-1]) > 1e-4


@torch.inference_mode()
def test_texts_of_unequal_length_are_not_joined_where_text_and_picture_attend_together(sd3):
    name, model = sd3
    ((text, options),) = texts(name, 1)
    joined = stack_conditionings([[[text, options]], [[text[:, :3], options]]], "positive")
    latent = {"samples": torch.cat([picture(model)["samples"]] * 2)}
    with pytest.raises(ValueError, match="^positive: its texts have unequal numbers of tokens"):
        invert_latent(model, joined, latent, InversionSettings(STEPS))


@torch.inference_mode()
def test_a_video_is_refused():
    model = small_family("Qwen-Image")
    with pytest.raises(ValueError, match="^latent_image: it is a video of 3 frames"):
        invert_latent(model, texts("Qwen-Image", 1), {"samples": torch.zeros(1, 16, 3, 8, 12)}, InversionSettings(2))
