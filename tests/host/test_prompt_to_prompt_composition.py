"""Prompt-to-Prompt beside other packs' patches, LoRA, ControlNets and Plug-and-Play, on stock nodes and with two encoders."""

from dataclasses import replace

import comfy.controlnet
import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from pix2pix_zero.devtools.graphs import Graph
from pix2pix_zero.host.methods.plug_and_play import with_source_features
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent, inverted_noise
from prompt_to_prompt_runs import (
    OFF,
    SOURCE,
    STEPS,
    Trace,
    apply_maps,
    branch,
    edit,
    encode,
    invert,
    maps_of,
    patch,
    sample,
)
from small_unet import CONFIG, SHALLOW, SmallSD, changed, latent
from tiny_clip import tiny_clip

import nodes as host_nodes


@pytest.fixture(scope="module", autouse=True)
def few_transformers():
    """Two in the middle, where other packs' patches act on both."""
    with changed({**SHALLOW, "transformer_depth_middle": 2}):
        yield


@pytest.fixture(scope="module")
def inversion(model, clip):
    return invert(model, clip)


class TinyXL(SmallSD):
    """Two encoders' width and a pooled vector, as in SDXL."""

    latent_format = comfy.latent_formats.SDXL


@pytest.fixture(scope="module")
def xl():
    pooled = 48
    settings = {**CONFIG, "context_dim": 80, "adm_in_channels": pooled + 6 * 256, "num_classes": "sequential"}
    config = TinyXL({**settings, "dtype": torch.float32})
    with torch.inference_mode():
        model = comfy.model_base.SDXL(config, device="cpu")
        generator = torch.Generator().manual_seed(0)
        for parameter in model.diffusion_model.parameters():
            value = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.data = value * 0.5 * fan_in**-0.5 if parameter.ndim > 1 else 1 + 0.02 * value
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu), tiny_clip("sdxl")


def test_a_model_with_two_encoders(xl):
    model, clip = xl
    inversion = invert(model, clip, method="direct")
    patched, positive = patch(model, inversion, clip, "a fluffy cat on a sofa", local_blend=0.5)
    assert positive[0][0].shape == (1, 77, 80) and positive[0][1]["pooled_output"].shape == (1, 48)
    edited = sample(patched, inversion, positive, encode(clip, ""))
    assert (edited - sample(model, inversion, positive, encode(clip, ""))).abs().max() > 1e-3 * edited.std()
    same = edit(model, inversion, clip, SOURCE, cfg=1.0)
    assert (same - latent()["samples"]).abs().max() <= 1e-3 * same.std()


def test_the_target_is_encoded_with_what_else_the_caption_carries(model, clip):
    caption = [[encode(clip, SOURCE)[0][0], {"width": 512, "strength": 0.7}]]
    with torch.inference_mode():
        inversion = invert_latent(model, caption, latent(), InversionSettings(STEPS, 0, OFF, map_memory=0))
    _, positive = patch(model, inversion, clip, "a dog on a sofa")
    assert positive[0][1]["width"] == 512 and positive[0][1]["strength"] == 0.7
    assert torch.equal(positive[0][0], encode(clip, "a dog on a sofa")[0][0])


def test_attention_of_another_pack_keeps_its_part(model, clip, inversion):
    """An IPAdapter-like patch adds to the text's attention; a second one reads the self-attention."""
    bonus = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(3))
    seen = []

    def foreign(q, k, v, options):
        heads = options["n_heads"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2) + bonus

    def itself(q, k, v, options):
        seen.append(options["block"])
        return v

    with Trace(model) as trace:
        trace.model.set_model_attn2_replace(foreign, "middle", 0)
        trace.model.set_model_attn1_replace(itself, "middle", 0)
        patched, positive = patch(trace.model, inversion, clip, "a dog on a sofa")
        sample(patched, inversion, positive, encode(clip, ""))
    assert seen
    source, call = trace.steps()[0]
    name = ("middle", 0, 1, "attn2")
    maps = maps_of(source["layers"][name]["to_q"], source["layers"][name]["to_k"])
    out = branch(call, name, "out", 0)
    assert (out - bonus - apply_maps(maps, branch(call, name, "to_v", 0))).norm() <= 1e-5 * out.norm()


@pytest.mark.parametrize("options", [{}, {"local_blend": 0.3}], ids=["plain", "blended"])
def test_keys_that_another_pack_adds_to_the_texts_are_not_taken_for_words(model, clip, inversion, options):
    """The text twice over is the same attention, and so the same edit."""
    longer = model.clone()
    longer.set_model_attn2_patch(lambda q, k, v, options: (q, k.repeat(1, 2, 1), v.repeat(1, 2, 1)))
    edits = []
    for each in (model, longer):
        patched, positive = patch(each, inversion, clip, "a dog on a sofa", **options)
        edits.append(sample(patched, inversion, positive, encode(clip, "")))
    assert (edits[0] - edits[1]).abs().max() <= 1e-4 * edits[0].std()


def test_lora_and_stock_patches_come_along(model, clip, inversion):
    name = next(name for name in model.model.state_dict() if name.endswith("attn2.to_q.weight"))
    weight = model.model.state_dict()[name]
    with_lora = model.clone()
    with_lora.add_patches({name: ("diff", (torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)),))})
    options = dict(target="a dog on a sofa", cross=0.0, to_itself=0.0)
    both = edit(with_lora, inversion, clip, **options)
    expected = sample(with_lora, inversion, encode(clip, "a dog on a sofa"), encode(clip, ""))
    assert (both - expected).abs().max() <= 1e-5 * expected.std()
    assert (both - edit(model, inversion, clip, **options)).abs().max() > 1e-3 * both.std()


def test_the_stock_nodes_sample_it(model, clip, run_node):
    inversion = invert(model, clip, method="direct")
    patched, positive = patch(model, inversion, clip, "a dog on a sofa")
    negative = encode(clip, "")
    noise = {"samples": inverted_noise(inversion, model)}
    expected = sample(patched, inversion, positive, negative)
    with torch.inference_mode():
        (by_ksampler,) = host_nodes.KSamplerAdvanced().sample(
            patched, "disable", 0, STEPS, 2.0, "euler", "ddim_uniform", positive, negative, noise, 0, 1000, "disable"
        )
        (guider,) = custom.CFGGuider.execute(patched, positive, negative, 2.0).result
        (nothing,) = custom.DisableNoise.execute().result
        (euler,) = custom.KSamplerSelect.execute("euler").result
        by_custom = custom.SamplerCustomAdvanced.execute(nothing, guider, euler, inversion.sigmas.flip(0), noise).result
    for result in (by_ksampler, by_custom[0]):
        assert (result["samples"] - expected).abs().max() <= 1e-5 * expected.std()


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("ending", [None, RuntimeError, Cancelled])
def test_the_users_model_is_left_as_it_was(model, clip, inversion, ending):
    target = "a dog on a sofa"
    negative = encode(clip, "")
    before = sample(model, inversion, encode(clip, target), negative)
    options = repr(model.model_options)
    patched, positive = patch(model, inversion, clip, target, local_blend=0.5)
    first = sample(patched, inversion, positive, negative) if ending is None else None

    def end(i, denoised, x, steps):
        if i == 1 and ending is not None:
            raise ending

    if ending is not None:
        with pytest.raises(ending):
            sample(patched, inversion, positive, negative, callback=end)
        first = sample(patched, inversion, positive, negative)
    assert repr(model.model_options) == options
    assert torch.equal(sample(model, inversion, encode(clip, target), negative), before)
    assert torch.equal(sample(patched, inversion, positive, negative), first), "runs do not leak into each other"


def test_plug_and_play_on_the_same_model_composes_in_either_order(model, clip):
    inversion = invert(model, clip, method="direct")
    negative = encode(clip, "")

    def both(first, target=SOURCE, cfg=1.0):
        def plug(model):
            with torch.inference_mode():
                return with_source_features(model, inversion, 0.5, 0.5)

        base = plug(model) if first else model
        patched, positive = patch(base, inversion, clip, target)
        return sample(patched if first else plug(patched), inversion, positive, negative, cfg)

    source = latent()["samples"]
    assert (both(True) - source).abs().max() <= 1e-4 * source.std()
    edited = both(True, "a dog on a sofa", 2.0)
    assert (edited - both(False, "a dog on a sofa", 2.0)).abs().max() <= 1e-5 * edited.std()
    alone = edit(model, inversion, clip, "a dog on a sofa")
    assert (edited - alone).abs().max() > 1e-3 * edited.std()


def test_a_controlnet_on_the_edit_is_not_handed_on_to_the_source(model, clip, inversion):
    class Control(comfy.controlnet.ControlBase):
        asked = []

        def get_control(self, x, timestep, cond, batched_number, transformer_options):
            self.asked.append(list(transformer_options["cond_or_uncond"]))
            return {"middle": [torch.ones(1, 128, 4, 4)]}

        def copy(self):
            return Control()

    with Trace(model) as trace:
        patched, positive = patch(trace.model, inversion, clip, "a dog on a sofa")
        controlled = [[positive[0][0], {"control": Control(), "control_apply_to_uncond": True}]]
        edited = sample(patched, inversion, controlled, encode(clip, ""))
    assert len(Control.asked) == STEPS
    assert all(len(branches) == 2 for branches in Control.asked)
    assert (edited - sample(patched, inversion, positive, encode(clip, ""))).abs().max() > 1e-3 * edited.std()


def test_a_controlnet_of_the_caption_is_loaded_and_cleaned_up(model, clip, inversion):
    class Control(comfy.controlnet.ControlBase):
        loaded = cleaned = 0

        def get_control(self, x, timestep, cond, batched_number, transformer_options):
            return {"middle": [torch.ones(1, 128, 4, 4)]}

        def get_models(self):
            Control.loaded += 1
            return []

        def cleanup(self):
            Control.cleaned += 1

        def copy(self):
            return Control()

    caption = [[inversion.source[0][0], {"control": Control(), "control_apply_to_uncond": False}]]
    controlled = replace(inversion, source=caption)
    patched, _ = patch(model, controlled, clip, "a dog on a sofa")
    text, negative = encode(clip, "a dog on a sofa"), encode(clip, "")
    edited = sample(patched, controlled, text, negative)
    assert Control.loaded and Control.cleaned
    plain, _ = patch(model, inversion, clip, "a dog on a sofa")
    assert (edited - sample(plain, inversion, text, negative)).abs().max() > 1e-3 * edited.std()


def test_it_runs_on_the_server_from_stock_nodes(server):
    graph = Graph()
    parts = graph.add("Pix2PixZeroDemoModel")
    scene = graph.add("Pix2PixZeroDemoScene", subject="cat", seed=3)
    target = graph.add("StringReplace", string=scene[2], find="cat", replace="dog")
    picture = graph.add("VAEEncode", pixels=scene[0], vae=parts[2])
    caption = graph.add("CLIPTextEncode", clip=parts[1], text=scene[2])
    inversion = graph.add("Pix2PixZeroInversion", model=parts[0], positive=caption[0], latent_image=picture[0], steps=4)
    edited = graph.add(
        "Pix2PixZeroPromptToPrompt",
        model=parts[0],
        inversion=inversion[0],
        clip=parts[1],
        source=scene[2],
        target=target[0],
        local_blend=0.3,
    )
    guider = graph.add("CFGGuider", model=edited[0], positive=edited[1], negative=caption[0], cfg=1.5)
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("DisableNoise")[0],
        guider=guider[0],
        sampler=graph.add("KSamplerSelect", sampler_name="euler")[0],
        sigmas=inversion[2],
        latent_image=inversion[1],
    )
    shown = graph.add("PreviewImage", images=graph.add("VAEDecode", samples=sampled[0], vae=parts[2])[0])
    outputs = server.run(graph.api(server.object_info()))
    assert server.view(outputs[shown.key]["images"][0]).startswith(b"\x89PNG")


def test_a_compiled_model_gives_the_same_edit(model, clip, inversion):
    """Compiled as packs do, by an object patch, with and without the mask of local blending."""
    compiled = model.clone()
    compiled.add_object_patch(
        "diffusion_model", torch.compile(model.get_model_object("diffusion_model"), backend="eager")
    )
    for options in ({}, {"local_blend": 0.3}):
        expected = edit(model, inversion, clip, "a dog on a sofa", **options)
        result = edit(compiled, inversion, clip, "a dog on a sofa", **options)
        assert (result - expected).abs().max() <= 1e-5 * expected.std()
