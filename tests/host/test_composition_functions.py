"""Guided edits beside functions around the UNet's calls: this pack's own methods, compilers, wrappers, CFG functions."""

import weakref
from dataclasses import replace

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from composed_run import directional_derivative, edit, guided_step, invert, same, soft_model, stock_edit
from guided_pass import latents, sigma_of
from patch_catalogue import MODEL_PATCHES, core_extra, patched, random
from pix2pix_zero.host.methods.plug_and_play import with_source_features
from pix2pix_zero.host.methods.prompt_to_prompt import PromptEditSettings, edit_by_prompt
from small_unet import SHALLOW, changed, conditioning, latent

import nodes as core

pytestmark = pytest.mark.usefixtures("narrow_unet")

STRENGTH = 0.005
TEXTS = conditioning(), conditioning(seed=1), conditioning(seed=9)


@pytest.fixture(scope="module")
def model():
    with changed(SHALLOW):
        return soft_model()


@pytest.fixture(scope="module")
def double():
    with changed(SHALLOW):
        return soft_model(torch.float64)


def apply(name, model):
    with torch.inference_mode():
        return MODEL_PATCHES[name].model(model)


def plug(model, inversion, until=1.0):
    with torch.inference_mode():
        return with_source_features(model, inversion, until, until)


def test_plug_and_play_is_in_the_estimate_and_the_gradient_of_a_guided_step(model, double):
    inversion = invert(model)
    x_source, (_, x) = inversion.latent_at(sigma_of(model)), latents(model)
    plugged = plug(model, inversion)
    stock, estimate, gradient, distance = guided_step(plugged, TEXTS, x_source, x)
    assert (estimate - stock).norm() <= 1e-4 * stock.norm()
    reference = plug(double, replace(inversion, model=weakref.ref(double.model)))
    direction = random(*x.shape, seed=3).double()
    slope, expected = directional_derivative(reference, TEXTS[:2], x_source.double(), x.double(), direction, 1e-4)
    assert float(distance) == pytest.approx(float(expected), rel=1e-4)
    assert float((gradient.double() * direction).sum()) == pytest.approx(float(slope), rel=1e-3)
    plain, *_ = guided_step(model, TEXTS, x_source, x)
    assert (plain - stock).norm() > 1e-2 * stock.norm(), "Plug-and-Play must matter"


@pytest.mark.parametrize("name", ["merged LoRA", "image-prompt attention", "perturbed attention"])
def test_plug_and_play_composes_in_either_order(model, name):
    inversion = invert(apply(name, model), method="direct")
    before, after = plug(apply(name, model), inversion, 0.5), apply(name, plug(model, inversion, 0.5))
    edited = stock_edit(before, inversion)
    assert same(stock_edit(after, inversion), edited, 1e-5)
    assert not same(stock_edit(apply(name, model), inversion), edited, 1e-2), "Plug-and-Play must matter"
    assert not same(stock_edit(plug(model, inversion, 0.5), inversion), edited, 1e-3), "the patch must matter"
    guided = edit(before, inversion, strength=STRENGTH)
    assert same(edit(after, inversion, strength=STRENGTH), guided)


@pytest.mark.parametrize("name", ["merged LoRA", "image-prompt attention", "perturbed attention", "wrappers"])
def test_prompt_to_prompt_composes_in_either_order(model, clip, name):
    words, others = "a cat on a sofa", "a dog on a sofa"
    with torch.inference_mode():
        source = core.CLIPTextEncode().encode(clip, words)[0]
    changed = apply(name, model)
    inversion = invert(changed, source, method="direct")

    def swap(model, target):
        with torch.inference_mode():
            return edit_by_prompt(model, inversion, clip, words, target, PromptEditSettings())

    before, positive = swap(changed, others)
    after, alone = apply(name, swap(model, others)[0]), swap(model, others)[0]
    edited, other_order, without, only = (
        stock_edit(sampled, inversion, positive, source) for sampled in (before, after, alone, changed)
    )
    assert same(other_order, edited, 1e-5)
    assert not same(without, edited, 1e-3), "the patch must matter"
    assert not same(only, edited, 1e-3), "Prompt-to-Prompt must matter"
    if name in ("merged LoRA", "wrappers"):  # which treat both texts and every pass alike
        back = stock_edit(swap(changed, words)[0], inversion, source, source)
        assert same(back, inversion.trajectory[0] / model.model.latent_format.scale_factor)


@pytest.mark.parametrize(
    "name", ["perturbed attention", "self-attention guidance", "model function wrapper", "wrappers"]
)
def test_maps_kept_from_an_inversion_are_those_of_its_own_pass(model, name):
    """Guidance by another pass calls the UNet again, with other attention, ahead of the next step."""
    changed = apply(name, model)
    kept, anew = (edit(changed, invert(changed, map_memory=size), strength=STRENGTH) for size in (2**30, 0))
    assert same(kept, anew)


def test_a_function_that_evaluates_the_branches_again_does_not_count_twice(model):
    def again(args):
        guider_options = args["model_options"]
        comfy.samplers.sampling_function(
            args["model"], args["input"], args["sigma"], args["uncond"], args["cond"], 2.0,
            {**guider_options, "sampler_post_cfg_function": []},
        )  # fmt: skip
        return args["denoised"]

    (repeating,) = [patched(("set_model_sampler_post_cfg_function", again))(model)]
    x_source, x = latents(model)
    once, twice = (guided_step(model, TEXTS, x_source, x)[2:] for model in (model, repeating))
    assert torch.equal(once[0], twice[0])
    assert torch.equal(once[1], twice[1])


def test_texts_that_another_pack_adds_to_a_batch_are_left_alone(model):
    """As packs do that lead away from a second negative: a wrapper puts it beside the others."""

    def evaluate(executor, model, conds, x, timestep, model_options):
        extra = [{**entry, "uuid": object()} for entry in conds[0]]
        *estimates, _ = executor(model, [*conds, extra], x, timestep, model_options)
        return estimates

    joined = model.clone()
    joined.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "another", evaluate)
    expected = edit(model, invert(model), strength=STRENGTH)
    assert same(edit(joined, invert(joined), strength=STRENGTH), expected)


def tiles(apply_model, args):
    x, t, c = args["input"], args["timestep"], args["c"]
    half = x.shape[-1] // 2
    return torch.cat([apply_model(part, t, **c) for part in x.split(half, -1)], -1)


def rows(apply_model, args):
    x, t, c = args["input"], args["timestep"], args["c"]
    text = c["c_crossattn"]
    parts = range(len(x))
    return torch.cat([apply_model(x[i : i + 1], t[i : i + 1], **{**c, "c_crossattn": text[i : i + 1]}) for i in parts])


@pytest.mark.parametrize("cut", [tiles, rows])
def test_wrappers_that_cut_up_a_call_are_refused_in_words_when_guided(model, cut):
    tiled = patched(("set_model_unet_function_wrapper", cut))(model)
    inversion = invert(model, picture=latent(2, 8, 12))
    assert edit(tiled, inversion).isfinite().all()
    with pytest.raises(ValueError, match="model: another node cuts the picture or the batch.*guidance_strength to 0"):
        edit(tiled, inversion, strength=STRENGTH)


def test_others_find_in_a_guided_call_what_they_find_in_any(model):
    """Everything in the transformer options, with one text in place of two."""
    seen = []

    def look(executor, x, timesteps, context=None, y=None, control=None, transformer_options={}, **kwargs):
        seen.append((torch.is_grad_enabled(), dict(transformer_options), len(x)))
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", look)
    watched.model_options["transformer_options"]["theirs"] = mark = object()
    inversion = invert(watched, steps=1)
    seen.clear()
    stock_edit(watched, inversion)
    ((_, stock, _),) = seen
    seen.clear()
    edit(watched, inversion, strength=STRENGTH)
    (guided,) = [options for with_gradient, options, _ in seen if with_gradient]
    assert stock.keys() <= guided.keys()
    assert guided["theirs"] is mark
    assert torch.equal(guided["sample_sigmas"], stock["sample_sigmas"])
    assert torch.equal(guided["sigmas"], stock["sigmas"])
    assert guided["cond_or_uncond"] == [0]
    (negative,) = [options for with_gradient, options, _ in seen if options["cond_or_uncond"] == [1]]
    assert set(guided["uuids"]) | set(negative["uuids"]) <= {
        uuid for _, options, _ in seen for uuid in options["uuids"]
    }


@pytest.mark.parametrize("patch", ["HyperTile", "ToMe"])
def test_patches_that_draw_lots_draw_the_same_where_a_pass_is_repeated(patch):
    """At preset "low memory" every block runs again in the backward pass. The patches act on the outer level's layers."""
    model = soft_model()
    chosen = {
        "HyperTile": core_extra("nodes_hypertile", "HyperTile", 8, 4, 1, False),
        "ToMe": core_extra("nodes_tomesd", "TomePatchModel", 0.5),
    }[patch]
    with torch.inference_mode():
        changed = chosen(model)
    inversion = invert(model, map_memory=0)

    def drawn(preset, seed):
        torch.manual_seed(seed)
        return edit(changed, inversion, strength=STRENGTH, preset=preset)

    default = drawn("default", 1)
    assert same(drawn("low memory", 1), default)
    assert not same(drawn("default", 2), default, 1e-3), "lots must matter"


def test_a_compiled_model_is_guided_as_the_plain_one(model):
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=["diffusion_model.middle_block.1.transformer_blocks.0"])
    inversion = invert(compiled, steps=2)
    assert torch.equal(edit(compiled, inversion), stock_edit(compiled, inversion))
    assert same(edit(compiled, inversion, strength=STRENGTH), edit(model, inversion, strength=STRENGTH))
