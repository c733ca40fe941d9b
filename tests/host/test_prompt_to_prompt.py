"""Prompt-to-Prompt through ComfyUI's own samplers, against the paper's formulas restated on what the layers saw."""

from dataclasses import replace

import comfy.controlnet
import comfy.model_base
import comfy.model_management
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from pix2pix_zero.devtools.graphs import Graph
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.plug_and_play import with_source_features
from pix2pix_zero.host.sampling import generate_reference, invert_latent, inverted_noise
from pix2pix_zero.nodes.prompt_to_prompt import Pix2PixZeroPromptToPrompt
from small_unet import CONFIG, SmallSD, latent, small_model
from tiny_clip import tiny_clip

import nodes as host_nodes

SOURCE = "a cat on a sofa"
STEPS = 4
HEADS = 4
OFF = NoiseRegularization(steps=0)


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        model = small_model()
        comfy.model_management.load_models_gpu([model])
        return model


def encode(clip, text):
    with torch.inference_mode():
        return host_nodes.CLIPTextEncode().encode(clip, text)[0]


def invert(model, clip, text=SOURCE, picture=None, method="ddim"):
    with torch.inference_mode():
        picture = picture or latent()
        return invert_latent(model, encode(clip, text), picture, STEPS, 0, OFF, method, map_memory=0)


@pytest.fixture(scope="module")
def inversion(model, clip):
    return invert(model, clip)


def patch(model, inversion, clip, target, source=SOURCE, cross=0.5, to_itself=0.5, **options):
    """(the patched MODEL, the encoded target), by the node."""
    with torch.inference_mode():
        node = Pix2PixZeroPromptToPrompt.execute(model, inversion, clip, source, target, cross, to_itself, **options)
    return node.result


def sample(model, inversion, positive, negative, cfg=2.0, sampler="euler", sigmas=None, callback=None):
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        noise = inverted_noise(inversion, model)
        sigmas = inversion.sigmas.flip(0) if sigmas is None else sigmas
        sampler = comfy.samplers.sampler_object(sampler)
        return guider.sample(torch.zeros_like(noise), noise, sampler, sigmas, callback=callback, seed=0)


def edit(model, inversion, clip, target, cfg=2.0, negative=None, **options):
    patched, positive = patch(model, inversion, clip, target, **options)
    return sample(patched, inversion, positive, negative or encode(clip, ""), cfg)


class Trace:
    """What every attention layer saw and gave in each UNet call, told by hooks on the layers' own projections."""

    def __init__(self, model):
        self.calls = []
        self.model = model.clone()
        theirs = model.model_options.get("model_function_wrapper")
        assert theirs is None

        def begin(apply_model, call):
            self.calls.append({"branches": call["cond_or_uncond"], "layers": {}, "x": call["input"].clone()})
            return apply_model(call["input"], call["timestep"], **call["c"])

        self.model.set_model_unet_function_wrapper(begin)

    def __enter__(self):
        self.handles = []
        for name, layer in attention_layers(self.model.model.diffusion_model):
            for part in ("to_q", "to_k", "to_v"):
                hook = self._keep(name, part)
                self.handles.append(getattr(layer, part).register_forward_hook(lambda m, a, out, hook=hook: hook(out)))
            hook = self._keep(name, "out")
            self.handles.append(layer.to_out[0].register_forward_pre_hook(lambda m, args, hook=hook: hook(args[0])))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _keep(self, name, part):
        def keep(tensor):
            self.calls[-1]["layers"].setdefault(name, {})[part] = tensor.clone()

        return keep

    def steps(self):
        """(source call or None, edit call) of each step."""
        pairs, source = [], None
        for call in self.calls:
            if len(call["branches"]) == 1:
                source = call
            else:
                pairs.append((source, call))
                source = None
        return pairs


def attention_layers(unet):
    """((block, number, index, "attn1" or "attn2"), layer)."""
    groups = (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks))
    for name, blocks in groups:
        for number, block in enumerate(blocks):
            for transformer in (layer for layer in block if isinstance(layer, SpatialTransformer)):
                for index, inner in enumerate(transformer.transformer_blocks):
                    yield (name, number, index, "attn1"), inner.attn1
                    yield (name, number, index, "attn2"), inner.attn2


def by_head(t):
    return t.double().unflatten(-1, (HEADS, -1)).transpose(1, 2)


def maps_of(q, k):
    q, k = by_head(q), by_head(k)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def apply_maps(maps, v):
    return (maps @ by_head(v)).transpose(1, 2).flatten(2)


def branch(call, name, part, index):
    tensor = call["layers"][name][part]
    return tensor.chunk(len(call["branches"]))[call["branches"].index(index)]


def replaced(source, own):
    """SOURCE -> "a dog on a sofa": every map comes from the source."""
    return source


def refined(source, own):
    """SOURCE -> "a fluffy cat on a sofa": tokens after the new one move by one, and padding stays in its place."""
    edited = own.clone()
    edited[..., :2] = source[..., :2]
    edited[..., 3:8] = source[..., 2:7]  # cat on a sofa <end>
    edited[..., 8:] = source[..., 8:]
    return edited


def reweighted(source, own):
    """SOURCE with "cat: 3, sofa: 0"; outside the window of replacement too."""
    edited = own.clone()
    edited[..., 2] *= 3
    edited[..., 5] *= 0
    return edited


@pytest.mark.parametrize(
    ("target", "formula", "reweight"),
    [
        ("a dog on a sofa", replaced, ""),
        ("a fluffy cat on a sofa", refined, ""),
        (SOURCE, lambda source, own: reweighted(source, source), "cat: 3, sofa: 0"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_follows_the_papers_formulas(model, clip, target, formula, reweight, batch):
    inversion = invert(model, clip, picture=latent(batch, 8, 12))
    with Trace(model) as trace:
        patched, positive = patch(trace.model, inversion, clip, target, cross=0.5, to_itself=0.25, reweight=reweight)
        sample(patched, inversion, positive, encode(clip, ""))
    steps = trace.steps()
    assert len(steps) == STEPS
    small = {8 * 12 // 4}
    for number, (source, call) in enumerate(steps):
        assert (source is None) == (number >= 2), "the source is needed in the windows only"
        if source is not None:
            model_input = inversion.trajectory[STEPS - number]
            assert torch.equal(source["x"], model_input), "the source branch is on the inversion's trajectory"
        for name in call["layers"]:
            for index in (0, 1):
                q, k, v, out = (branch(call, name, part, index) for part in ("to_q", "to_k", "to_v", "out"))
                own = maps_of(q, k)
                expected = own
                if index == 0 and name[3] == "attn1" and number < 1 and q.shape[1] in small:
                    expected = maps_of(source["layers"][name]["to_q"], source["layers"][name]["to_k"])
                if index == 0 and name[3] == "attn2" and number < 2:
                    of_source = maps_of(source["layers"][name]["to_q"], source["layers"][name]["to_k"])
                    expected = formula(of_source, own)
                elif index == 0 and name[3] == "attn2" and reweight:
                    expected = reweighted(None, own)
                difference = (out.double() - apply_maps(expected, v)).norm() / out.norm()
                assert difference <= 2e-6, (number, name, index)
                changed = (apply_maps(expected - own, v)).norm() / out.norm() > 1e-3
                assert changed == (expected is not own), "the formula must matter"


def test_a_swapped_word_of_more_tokens_gets_equal_shares(model, clip, inversion):
    target = "a tyrannosaurus on a sofa"
    pieces = [t for t in clip.tokenize("tyrannosaurus")["l"][0] if t[0] not in (49406, 49407)]
    assert len(pieces) > 1
    with Trace(model) as trace:
        patched, positive = patch(trace.model, inversion, clip, target, cross=1.0, to_itself=0.0)
        sample(patched, inversion, positive, encode(clip, ""))
    source, call = trace.steps()[0]
    name = ("middle", 0, 1, "attn2")
    maps = maps_of(source["layers"][name]["to_q"], source["layers"][name]["to_k"])
    n = len(pieces)
    own = maps_of(branch(call, name, "to_q", 0), branch(call, name, "to_k", 0))
    assert own.shape == maps.shape
    expected = torch.cat(
        [maps[..., :2], maps[..., 2:3].expand(-1, -1, -1, n) / n, maps[..., 3:7], maps[..., 6 + n :]], -1
    )
    out = apply_maps(expected, branch(call, name, "to_v", 0))
    assert (branch(call, name, "out", 0).double() - out).norm() <= 2e-6 * out.norm()


def test_the_same_text_gives_the_plain_reconstruction_or_better(model, clip, inversion):
    source = latent()["samples"]
    plain = sample(model, inversion, inversion.source, inversion.source, cfg=1.0) - source
    edited = edit(model, inversion, clip, SOURCE, cfg=1.0, cross=1.0, to_itself=1.0) - source
    assert edited.norm() <= plain.norm()
    direct = invert(model, clip, method="direct")
    exact = edit(model, direct, clip, SOURCE, cfg=1.0, cross=1.0, to_itself=1.0) - source
    assert exact.abs().max() <= 1e-4 * source.std()
    assert plain.abs().max() > 1e-2 * source.std()


def test_a_generated_picture_comes_back_with_its_own_text(model, clip):
    with torch.inference_mode():
        empty = {"samples": torch.zeros(1, 4, 8, 8)}
        negative = encode(clip, "ugly")
        inversion, samples = generate_reference(model, encode(clip, SOURCE), negative, empty, STEPS, 3.0, 7)
    again = edit(model, inversion, clip, SOURCE, cfg=3.0, negative=negative, cross=1.0, to_itself=1.0)
    assert (again - samples).abs().max() <= 1e-4 * samples.std()
    edited = edit(model, inversion, clip, "a dog on a sofa", cfg=3.0, negative=negative)
    assert (edited - samples).abs().max() > 1e-2 * samples.std()


def test_half_precision_gives_nearly_the_same_edit(clip):
    """Maps are drawn in fp32 whatever the model computes in."""
    edits = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            half = small_model(weight_dtype=dtype)
        edits.append(edit(half, invert(half, clip, method="direct"), clip, "a fluffy cat on a sofa"))
    assert (edits[0] - edits[1]).norm() <= 0.05 * edits[0].norm()


def test_without_windows_it_is_the_word_swap(model, clip, inversion):
    target = "a dog on a sofa"
    expected = sample(model, inversion, encode(clip, target), encode(clip, ""))
    swapped = edit(model, inversion, clip, target, cross=0.0, to_itself=0.0)
    assert (swapped - expected).abs().max() <= 1e-5 * expected.std()
    for window in (dict(cross=0.5, to_itself=0.0), dict(cross=0.0, to_itself=0.5)):
        edited = edit(model, inversion, clip, target, **window)
        assert (edited - expected).abs().max() > 1e-3 * expected.std()


def test_a_batch_equals_single_runs(model, clip):
    pictures = latent(batch=3, height=8, width=12)
    options = dict(target="a fluffy cat on a sofa", local_blend=0.5)
    together = edit(model, invert(model, clip, picture=pictures), clip, **options)
    for i in (0, 2):
        one = {"samples": pictures["samples"][i : i + 1]}
        alone = edit(model, invert(model, clip, picture=one), clip, **options)
        assert (together[i : i + 1] - alone).abs().max() <= 1e-4 * alone.std()


@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun", "dpmpp_2m", "dpm_2"])
def test_full_local_blend_brings_the_source_back_exactly(model, clip, inversion, sampler):
    """At threshold 1 nothing is above it, so everything stays: whatever the sampler, its last step ends on the source."""
    patched, positive = patch(model, inversion, clip, "a dog on a sofa", local_blend=1.0)
    edited = sample(patched, inversion, positive, encode(clip, ""), sampler=sampler)
    assert (edited - latent()["samples"]).abs().max() <= 1e-4 * edited.std()


@pytest.mark.parametrize("method", ["ddim", "direct"])
def test_outside_the_blend_mask_every_step_is_on_the_trajectory(model, clip, method):
    inversion = invert(model, clip, method=method)
    visited = []
    options = dict(local_blend=0.9, blend_words="cat, dog", cross=0.25)
    patched, positive = patch(model, inversion, clip, "a dog on a sofa", **options)
    edited = sample(patched, inversion, positive, encode(clip, ""), callback=lambda i, d, x, n: visited.append(x))
    latents = [(x, inversion.trajectory[STEPS - step]) for step, x in enumerate(visited)]
    latents.append((model.model.process_latent_in(edited), inversion.trajectory[0]))
    for ours, theirs in latents[2:]:  # the callback is given the latent before a step; blending starts with the second
        stays = ((ours - theirs).abs() <= 1e-5 * theirs.std()).all(1)
        assert 0 < stays.float().mean() < 1
    assert (visited[1] - inversion.trajectory[STEPS - 1]).abs().max() > 1e-3


def test_the_inversions_noise_mask_is_kept(model, clip):
    picture = latent()
    picture["noise_mask"] = torch.zeros(1, 8, 8)
    picture["noise_mask"][..., :4] = 1.0
    edited = edit(model, invert(model, clip, picture=picture), clip, "a dog on a sofa")
    difference = (edited - picture["samples"]).abs()
    assert difference[..., 4:].max() < 1e-4
    assert difference[..., :4].mean() > 0.1


def test_a_longer_negative_text_changes_nothing_in_the_positive_half(model, clip, inversion):
    """ComfyUI then repeats the shorter text's tokens, so that both halves go through the UNet together."""
    negative = encode(clip, "ugly " * 100)
    assert negative[0][0].shape[1] == 154
    patched, positive = patch(model, inversion, clip, "a fluffy cat on a sofa", reweight="cat: 2", local_blend=0.5)
    together = sample(patched, inversion, positive, negative)

    def one_by_one(args):
        rest = args["input"], args["sigma"], {**args["model_options"], "sampler_calc_cond_batch_function": None}
        rest[2].pop("sampler_calc_cond_batch_function")
        return [comfy.samplers.calc_cond_batch(args["model"], [cond], *rest)[0] for cond in args["conds"]]

    patched.set_model_sampler_calc_cond_batch_function(one_by_one)
    alone = sample(patched, inversion, positive, negative)
    assert (together - alone).abs().max() <= 1e-4 * alone.std()


def test_prompts_of_more_than_one_chunk(model, clip):
    """77 tokens against 154: more words than one chunk holds."""
    source = ", ".join(["a cat"] * 30)
    for before, after in ((source, "a dog"), ("a cat", source.replace("cat", "dog")), (source, source + " at night")):
        inversion = invert(model, clip, before)
        edited = edit(model, inversion, clip, after, source=before)
        assert edited.isfinite().all()


def test_weights_in_a_prompt_do_not_move_its_words(model, clip):
    """(word:1.2) changes the encoding, not the tokens."""
    source = "a (cat:1.3) on a sofa"
    inversion = invert(model, clip, source)
    with Trace(model) as trace:
        patched, positive = patch(trace.model, inversion, clip, "a (dog:0.8) on a sofa", source=source, to_itself=0.0)
        sample(patched, inversion, positive, encode(clip, ""))
    source_call, call = trace.steps()[0]
    name = ("middle", 0, 0, "attn2")
    maps = maps_of(source_call["layers"][name]["to_q"], source_call["layers"][name]["to_k"])
    expected = apply_maps(maps, branch(call, name, "to_v", 0))
    assert (branch(call, name, "out", 0).double() - expected).norm() <= 2e-6 * expected.norm()


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
        inversion = invert_latent(model, caption, latent(), STEPS, 0, OFF, map_memory=0)
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


def test_levels_between_those_of_the_inversion_are_interpolated(model, clip, inversion):
    patched, positive = patch(model, inversion, clip, "a dog on a sofa", local_blend=0.5)
    sigmas = inversion.sigmas.flip(0)
    finer = torch.cat([sigmas, (sigmas[:-1] + sigmas[1:]) / 2]).sort(descending=True).values
    edited = sample(patched, inversion, positive, encode(clip, ""), sigmas=finer)
    assert edited.isfinite().all()


def test_a_level_above_the_inversion_is_refused(model, clip, inversion):
    patched, positive = patch(model, inversion, clip, "a dog on a sofa")
    with pytest.raises(ValueError, match="sigmas: .*ddim_uniform with 4 steps"):
        sample(patched, inversion, positive, encode(clip, ""), sigmas=inversion.sigmas.flip(0) * 1.2)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(target="  "), "target: it is empty"),
        (dict(source=""), "source: it is empty"),
        (dict(source="a cat, " * 40), "source: it is 154 tokens long, but the text of the inversion 77"),
        (dict(reweight="horse: 2"), "reweight: 'horse' does not occur in target"),
        (dict(reweight="dog 2"), "reweight: 'dog 2' is not of the form"),
        (dict(reweight="dog: nan"), "reweight: 'dog: nan' is not of the form"),
        (dict(local_blend=0.3, blend_words="horse"), "blend_words: 'horse' does not occur in source or target"),
        (dict(target=SOURCE, local_blend=0.3), "local_blend: source and target are the same"),
    ],
)
def test_texts_that_do_not_fit_are_refused_in_words(model, clip, inversion, changes, message):
    with pytest.raises(ValueError, match=message):
        patch(model, inversion, clip, **{"target": "a dog on a sofa", **changes})


def test_other_models_and_parts_are_refused(model, clip, inversion):
    with torch.inference_mode():
        other = small_model(seed=5)
    with pytest.raises(ValueError, match="inversion: .*another model"):
        patch(other, inversion, clip, "a dog")
    patched, _ = patch(model, inversion, clip, "a dog on a sofa")
    with pytest.raises(ValueError, match="model: it has a Prompt-to-Prompt edit already"):
        patch(patched, inversion, clip, "a dog on a sofa")
    two = replace(inversion, source=inversion.source * 2)
    with pytest.raises(ValueError, match="inversion: its caption has 2 parts"):
        patch(model, two, clip, "a dog on a sofa")
    with pytest.raises(ValueError, match="clip: it does not belong"):
        patch(model, inversion, tiny_clip("sdxl"), "a dog on a sofa")


def test_sampling_that_does_not_fit_is_refused_in_words(model, clip, inversion):
    patched, positive = patch(model, inversion, clip, "a dog on a sofa")
    long = encode(clip, "a dog, " * 40)
    with pytest.raises(ValueError, match="positive: it is not the target text, which has 77 tokens"):
        sample(patched, inversion, long, encode(clip, ""))
    wide = invert(model, clip, picture=latent(1, 8, 16))
    with pytest.raises(ValueError, match=r"latent_image: its shape is \(1, 4, 8, 16\)"):
        sample(patched, wide, positive, encode(clip, ""))
    area = [[positive[0][0], {**positive[0][1], "area": (4, 4, 0, 0)}]]
    with pytest.raises(ValueError, match="positive: .*area"):
        sample(patched, inversion, area, encode(clip, ""))
    with pytest.raises(ValueError, match="model: a Prompt-to-Prompt edit is sampled with the stock KSampler"):
        invert(patched, clip)


def test_another_source_text_is_told(model, clip, inversion, caplog):
    patch(model, inversion, clip, "a dog on a sofa", source="a horse in a field")
    assert "not the one that the picture was inverted with" in caplog.text
    caplog.clear()
    patch(model, inversion, clip, "a dog on a sofa")
    assert not caplog.records


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


@pytest.mark.parametrize(
    ("limit", "message"),
    [(dict(area=(4, 4, 0, 0)), "area"), (dict(start_percent=0.9, end_percent=1.0), "part of the sampling")],
)
def test_a_caption_that_does_not_cover_the_picture_is_refused(model, clip, inversion, limit, message):
    limited = replace(inversion, source=[[inversion.source[0][0], limit]])
    patched, _ = patch(model, limited, clip, "a dog on a sofa")
    with pytest.raises(ValueError, match=f"inversion: its caption is limited to .*{message}"):
        sample(patched, limited, encode(clip, "a dog on a sofa"), encode(clip, ""))


def test_steps_without_the_target_are_not_blended(model, clip, inversion):
    """A target that comes in late (ConditioningSetTimestepRange) has drawn no maps before."""
    patched, positive = patch(model, inversion, clip, "a dog on a sofa", local_blend=0.5)
    late = [[positive[0][0], {"start_percent": 0.9, "end_percent": 1.0}]]
    assert sample(patched, inversion, late, encode(clip, "")).isfinite().all()


def test_a_model_without_text_encoder_is_told(model, inversion):
    with pytest.raises(ValueError, match="clip: there is none"):
        patch(model, inversion, None, "a dog")


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
