"""Plug-and-Play beside areas, several texts, ControlNets, masks and other packs' patches."""

import comfy.controlnet
import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import pytest
import torch
from pix2pix_zero.host.unet.gradients import uncompiled
from plug_and_play_runs import (
    STEPS,
    Recorder,
    distance,
    edited_calls,
    invert,
    patch,
    sample,
    source_features,
    without_values,
)
from small_unet import CONFIG, SmallSD, conditioning, latent


@pytest.fixture(scope="module")
def inversion(model):
    return invert(model)


def test_an_area_of_the_edit_gets_the_features_of_that_part_of_the_picture(model):
    inversion = invert(model, latent(width=16))
    text = conditioning(seed=1)[0][0]
    control = AddToOutput()  # of the edit, and none of the source's business
    left = [[text, {"area": (8, 8, 0, 0), "strength": 1.0, "control": control}], [text, {}]]
    recorder = Recorder()
    patched = patch(recorder.patch(model), inversion)
    with recorder.recording(model.model.diffusion_model):
        sample(patched, inversion, left, cfg=1.0)
    cropped = [call for call in recorder.calls if call["branch"].shape[-1] == 4]
    expected = source_features(inversion, STEPS, conditioning()[0][0], crop=slice(0, 8))
    for name, features in expected.items():
        assert all(distance(call[name][:1], features) < 1e-5 for call in cropped[:2]), name


def test_parts_of_the_source_text_are_weighted_like_their_predictions(model):
    """Two masked halves, each with a text of its own: each pixel has the features of its half's text."""
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    a, b = conditioning()[0][0], conditioning(seed=5)[0][0]
    source = [[a, {"mask": left, "mask_strength": 1.0}], [b, {"mask": 1 - left, "mask_strength": 1.0}]]
    inversion = invert(model, positive=source)
    call = edited_calls(model, inversion, rows=1, cfg=1.0)[0]
    one, other = (source_features(inversion, STEPS, text) for text in (a, b))
    assert distance(call["branch"][:1, ..., :2], one["branch"][..., :2]) < 1e-5
    assert distance(call["branch"][:1, ..., 2:], other["branch"][..., 2:]) < 1e-5
    for name, size in ((("q", 1), (4, 4)), (("k", 3), (8, 8))):
        rows, ones, others = (t.unflatten(1, size) for t in (call[name][:1], one[name], other[name]))
        half = size[1] // 2
        assert distance(rows[:, :, :half], ones[:, :, :half]) < 1e-5
        assert distance(rows[:, :, half:], others[:, :, half:]) < 1e-5


def test_masked_parts_are_refused_where_another_patch_resizes_self_attention(model):
    """One token of each row of pixels fewer than any size of the picture; without masks there is nothing to fit."""
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    resized = model.clone()
    resized.set_model_attn1_patch(lambda q, k, v, options: (q[:, 1:], k, v))
    resized.set_model_attn1_output_patch(lambda out, options: torch.nn.functional.pad(out, (0, 0, 1, 0)))
    a, b = conditioning()[0][0], conditioning(seed=5)[0][0]
    whole, halves = [[a, {}], [b, {}]], [[a, {"mask": left}], [b, {"mask": 1 - left}]]
    inversion = invert(resized, positive=whole)
    assert sample(patch(resized, inversion), inversion).isfinite().all()
    inversion = invert(resized, positive=halves)
    with pytest.raises(ValueError, match="model: another patch changes the size of its self-attention"):
        sample(patch(resized, inversion), inversion)


class AddToOutput(comfy.controlnet.ControlBase):
    """A ControlNet that adds a constant to the decoder's inputs and notes what it was asked for."""

    def __init__(self):
        super().__init__()
        self.seen, self.started, self.cleaned = [], 0, 0

    def pre_run(self, model, percent_to_timestep_function):
        self.started += 1

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.seen.append(x_noisy)
        return {"output": [torch.full((1, 128, 1, 1), 0.5)]}

    def get_models(self):
        return []

    def copy(self):
        return self

    def cleanup(self):
        self.cleaned += 1


def test_a_controlnet_of_the_source_acts_on_the_source_alone(model):
    control = AddToOutput()
    source = [[conditioning()[0][0], {"control": control, "control_apply_to_uncond": True}]]
    inversion = invert(model, positive=source)
    control.seen, control.started, control.cleaned = [], 0, 0
    call = edited_calls(model, inversion, rows=2)[0]
    assert [control.started, control.cleaned] == [1, 1]
    assert all(torch.equal(x, inversion.trajectory[level]) for x, level in zip(control.seen, range(STEPS, 0, -1)))
    assert len(control.seen) == STEPS
    hint = {"output": [torch.full((1, 128, 1, 1), 0.5)]}
    expected = source_features(inversion, STEPS, conditioning()[0][0], control=hint)
    without = source_features(inversion, STEPS, conditioning()[0][0])
    for name in expected:
        assert distance(call[name][:1], expected[name]) < 1e-5
    assert distance(call["branch"][:1], without["branch"]) > 1e-3


def test_a_controlnet_of_the_edit_does_not_reach_the_source(model, inversion):
    control = AddToOutput()
    positive = [[conditioning(seed=1)[0][0], {"control": control, "control_apply_to_uncond": True}]]
    call = edited_calls(model, inversion, rows=2, positive=positive)[0]
    assert all(len(x) == 2 for x in control.seen)
    expected = source_features(inversion, STEPS, conditioning()[0][0])
    assert all(distance(call[name][:1], features) < 1e-5 for name, features in expected.items())


def test_an_sdxl_source_keeps_its_pooled_text():
    class SmallXL(SmallSD):
        latent_format = comfy.latent_formats.SDXL
        memory_usage_factor = 1.0

    def make():
        config = SmallXL({**CONFIG, "num_classes": "sequential", "adm_in_channels": 2816, "num_heads": 4})
        config.manual_cast_dtype = None
        network = comfy.model_base.SDXL(config, device="cpu")
        weights = torch.Generator().manual_seed(0)
        for parameter in network.diffusion_model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=weights) * 0.05
        return comfy.model_patcher.ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))

    def text(seed):
        pooled = torch.randn(1, 1280, generator=torch.Generator().manual_seed(seed))
        return [[conditioning(seed=seed)[0][0], {"pooled_output": pooled}]]

    with torch.inference_mode():
        model, fresh = make(), make().model
        inversion = invert(model, positive=text(0))
        recorder, reference = Recorder(), Recorder()
        with recorder.recording(model.model.diffusion_model):
            sample(patch(recorder.patch(model), inversion), inversion, text(1), text(2))
        with reference.recording(fresh.diffusion_model):
            x = inversion.trajectory[-1]
            y = fresh.encode_adm(pooled_output=text(0)[0][1]["pooled_output"], width=64, height=64)
            fresh.apply_model(x, inversion.sigmas[-1:], c_crossattn=text(0)[0][0], transformer_options={}, y=y)
    call = next(call for call in recorder.calls if len(call["branch"]) == 2)
    for name, expected in without_values(reference.calls[0]).items():
        assert distance(call[name][:1], expected) < 1e-5
        assert distance(call[name][1:], expected) < 1e-5


def test_the_negative_is_blended_with_the_source_text(model, inversion):
    sigma = inversion.sigmas[-1:]
    sigmas = torch.cat([sigma, sigma.new_zeros(1)])  # one euler step to 0: the result is the prediction

    def predict(m, negative, cfg):
        return model.model.process_latent_in(sample(m, inversion, negative=negative, cfg=cfg, sigmas=sigmas))

    edit, empty, source = (
        predict(model, negative, cfg)
        for negative, cfg in ((None, 1.0), (conditioning(seed=2), 0.0), (conditioning(), 0.0))
    )
    against = 0.75 * empty + 0.25 * source
    expected = against + 3.0 * (edit - against)
    blended = predict(patch(model, inversion, 0.0, 0.0, negative_alpha=0.75), conditioning(seed=2), 3.0)
    assert distance(blended, expected) < 1e-5
    assert distance(blended, empty + 3.0 * (edit - empty)) > 1e-3


def test_what_the_picture_masks_out_stays_as_it_is(model):
    picture = latent(batch=2)
    picture["noise_mask"] = torch.zeros(1, 8, 8)
    picture["noise_mask"][..., :4] = 1.0
    inversion = invert(model, picture)
    edited = sample(patch(model, inversion, 0.8, 0.5), inversion)
    assert (edited - picture["samples"])[..., 4:].abs().max() < 1e-5 * edited.std()
    assert (edited - picture["samples"])[..., :4].abs().mean() > 0.1


def test_the_later_of_two_nodes_counts(model, inversion):
    other = invert(model, latent(seed=9))
    twice = patch(patch(model, other, negative_alpha=0.5), inversion, 0.8, 0.5)
    assert torch.equal(sample(twice, inversion), sample(patch(model, inversion, 0.8, 0.5), inversion))


def test_compiled_code_does_not_keep_hooks_out():
    layer = torch.nn.Linear(2, 2, bias=False)
    compiled = torch.compile(layer, backend="eager")
    x = torch.ones(1, 2)
    with torch.inference_mode():
        plain = compiled(x)
        with layer.register_forward_hook(lambda module, args, out: out + 1):
            with uncompiled(layer):
                hooked = compiled(x)
        after = compiled(x)
    assert torch.equal(hooked, plain + 1)
    assert torch.equal(after, plain)


def test_another_packs_patch_still_computes_the_attention(model, inversion):
    silenced = model.clone()
    silenced.set_model_attn1_replace(lambda q, k, v, extra_options: torch.zeros_like(q), "output", 2)
    result = sample(patch(silenced, inversion), inversion)
    assert not torch.equal(result, sample(patch(model, inversion), inversion))


def test_a_patch_that_cuts_attention_another_way_each_time_is_refused(model, inversion):
    tiled, calls = model.clone(), []

    def cut(n, context, value, extra_options):
        calls.append(n)
        return (n[:, ::2] if len(calls) > 8 else n), context, value

    tiled.set_model_attn1_patch(cut)
    tiled.set_model_attn1_output_patch(lambda n, extra_options: torch.cat([n, n], 1) if len(calls) > 8 else n)
    with pytest.raises(ValueError, match="model: another patch cuts the picture.*swap_size"):
        sample(patch(tiled, inversion), inversion)
