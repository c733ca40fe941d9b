"""Cross-attention guidance of diffusion transformers: its gradient against float64, and edits that are guided by it."""

import comfy.model_management
import comfy.quant_ops
import pytest
import torch
from flow_families import FAMILIES, LIKE_FLUX, META, TOKENS, picture, texts
from joint_runs import Seen, evaluate
from pix2pix_zero.attention_patches.joint import reading_calls
from pix2pix_zero.editing.guidance import distance_step
from pix2pix_zero.host import running
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.host.sampling.passes import UNetPasses
from pix2pix_zero.host.text.conditionings import WORDS
from pix2pix_zero.host.unet import map_jobs
from pix2pix_zero.host.unet.gradients import input_gradients
from pix2pix_zero.host.unet.map_jobs import Checkpointing
from pix2pix_zero.host.unet.transformer_memory import graph_parts, reference_memory
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler
from plain_dit import SIGMA, PlainDiT, guider_gradient, latents, run_in_guider, sharp_family

STEPS = 2
NAMES = [name for name, family in FAMILIES.items() if family.known]


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    """(name, MODEL)"""
    with torch.inference_mode():
        return request.param, sharp_family(request.param)


def test_the_gradient_is_that_of_ordinary_autograd_in_float64(family):
    name, model = family
    x_source, x = latents(model)
    gradient, distance = guider_gradient(model, name, x_source, x)
    expected, expected_distance = PlainDiT(name).gradient(x_source, x)
    assert gradient.shape == x.shape and expected.abs().max() > 0
    torch.testing.assert_close(distance.double(), expected_distance, rtol=5e-5, atol=0)
    assert float((gradient - expected).norm() / expected.norm()) <= 5e-5


def inverted(name, model, batch=1, seeds=(3,)):
    samples = torch.cat([picture(model, batch, seed)["samples"] for seed in seeds])
    return invert_latent(model, texts(name, 1), {"samples": samples}, InversionSettings(STEPS))


def edit(name, model, inversion, strength=0.0, text=2, **settings):
    """What the node draws."""
    given = {
        "cfg": 3.0,
        "guidance_strength": strength,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "preset": "default",
        "local_blend": 0.0,
        "feature_until": 0.0,
        **settings,
    }
    texts_of = {"positive": texts(name, text), "negative": texts(name, 1)}
    inputs = {"model": model, "inversion": inversion, **texts_of, **given}
    (latent,), _ = Pix2PixZeroKSampler.execute(**{key: [value] for key, value in inputs.items()}).result
    return latent["samples"]


@torch.inference_mode()
def test_guidance_acts_in_every_step_and_an_unedited_picture_comes_back(family, monkeypatch):
    name, model = family
    said = []
    monkeypatch.setattr(running, "show", said.append)
    inversion, clean = inverted(name, model), picture(model)["samples"]
    unguided, guided = (edit(name, model, inversion, strength) for strength in (0.0, 0.3))
    assert guided.shape == clean.shape and guided.isfinite().all()
    assert (guided - unguided).abs().max() > 1e-3 * unguided.std()
    off = [float(text.rsplit(" ", 1)[1]) for text in said if "layout off by" in text]
    assert len(off) == STEPS
    assert (edit(name, model, inversion, 0.3, text=1) - clean).abs().max() <= 1e-4 * clean.std()


@torch.inference_mode()
def test_only_the_words_that_are_told_are_compared():
    """Rows of the source beside those of another text, against the exact block of a second attention call."""
    name = "SD 3"
    model = sharp_family(name)
    x_source, _ = latents(model)
    pairs = ((1, 2), (2, 4), (5, 5))
    ((text, options),) = texts(name, 2)
    found = recorded(model, name, x_source, [[text, {**options, WORDS: (pairs,)}]])
    for branch, number in (("source", 1), ("positive", 2)):
        rows = [pair[number - 1] for pair in pairs]
        exact = one_hot_blocks(model, name, x_source, texts(name, number))
        for maps, block in zip(found[branch], exact, strict=True):
            own = block[..., rows]
            torch.testing.assert_close(maps, own / own.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


def one_hot_blocks(model, name, x, text):
    """[B, heads, pixels, TOKENS] of each block: what the host's attention makes of values that are one-hot in the text's rows."""
    blocks = []

    def attend(func, q, k, v, heads, *args, **options):
        width = v.flatten(2).shape[-1] // heads
        marks = torch.zeros(k.shape[1], heads, width)
        marks[range(TOKENS), :, range(TOKENS)] = 1.0
        out = func(q, k, marks.flatten(1).expand(len(k), -1, -1), heads, *args, **options)
        blocks.append(out[:, TOKENS:].unflatten(-1, (heads, -1)).transpose(1, 2)[..., :TOKENS])
        return func(q, k, v, heads, *args, **options)

    evaluate(model, name, x, {"transformer_options": {"optimized_attention_override": attend}}, text)
    return blocks


def recorded(model, name, x, edited):
    """The maps of both texts at a latent, by branch."""
    found = {}

    def walk(model_k, noise, sigmas, extra_args, callback, disable):
        passes = UNetPasses(model_k, extra_args, reading_calls(model.model.diffusion_model))
        for branch in ("source", "positive"):
            found[branch] = list(passes.record_maps(branch, x.clone(), SIGMA).values())
        return noise

    run_in_guider(model, name, walk, edited)
    return found


@pytest.mark.parametrize("name", ["SD 3", "Flux dev", "Wan 2.1"])
@torch.inference_mode()
def test_guidance_brings_the_maps_back(name):
    """From the same latent, a step down the gradient is nearer to the source's maps, and blocks computed again change nothing."""
    model = sharp_family(name)
    x_source, x = latents(model)
    (gradient, distance), repeated = (
        guider_gradient(model, name, x_source, x, Checkpointing(mode, 1)) for mode in ("none", "blocks")
    )
    torch.testing.assert_close(repeated, [gradient, distance], rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
    shift = distance_step(gradient, distance, 0.1, longest=1.0)
    _, nearer = guider_gradient(model, name, x_source, x + shift)
    assert 0.5 * distance < nearer < 0.99 * distance


@pytest.mark.parametrize("name", ["SD 3", "Flux dev", "Wan 2.1"])
@torch.inference_mode()
def test_batches_equal_single_runs(name):
    model = sharp_family(name)
    both, single = (inverted(name, model, seeds=seeds) for seeds in ((3, 4), (4,)))
    edits = [edit(name, model, inversion, 0.3) for inversion in (both, single)]
    assert (edits[0][1:] - edits[1]).abs().max() <= 1e-4


@pytest.mark.parametrize("preset", ["fast", "low memory", "paper"])
@torch.inference_mode()
def test_presets_guide_as_they_do_on_unets(preset):
    name = "SD 3"
    model = sharp_family(name)
    inversion, clean = inverted(name, model), picture(model)["samples"]
    strength = 0.0 if preset == "paper" else 0.3
    assert (edit(name, model, inversion, strength, text=1, preset=preset) - clean).abs().max() <= 1e-4 * clean.std()
    guided, plain = (edit(name, model, inversion, strength, preset=each) for each in (preset, "default"))
    if preset == "low memory":
        assert (guided - plain).abs().max() <= 1e-4 * plain.std()
    else:
        assert (guided - plain).abs().max() > 1e-4 * plain.std()


@torch.inference_mode()
def test_blocks_that_another_pack_calls_are_not_repeated():
    """SD 3 would then call them under PyTorch's checkpointing."""
    name = "SD 3"
    model = sharp_family(name)
    x_source, x = latents(model)
    expected = guider_gradient(model, name, x_source, x)
    patched, calls = model.clone(), []

    def call(args, extra):
        calls.append(args)
        return extra["original_block"](args)

    patched.set_model_patch_replace(call, "dit", "double_block", 0)
    assert all(torch.equal(*pair) for pair in zip(guider_gradient(patched, name, x_source, x), expected))
    assert calls


@torch.inference_mode()
def test_attention_of_another_pack_still_runs():
    name = "Flux dev"
    model = sharp_family(name)
    x_source, x = latents(model)
    seen = Seen()
    ours, expected = (guider_gradient(each, name, x_source, x) for each in (seen.patch(model), model))
    assert all(torch.equal(*pair) for pair in zip(ours, expected))
    assert len(seen.calls) >= 3 * 2  # the last of each pass is not needed


class InPlace(torch.nn.Module):
    """A block that adds to what autograd has saved, as Flux does."""

    def __init__(self, add):
        super().__init__()
        self.add = add

    def forward(self, x):
        product = x * x
        kept = product * product
        return self.add(product, kept) + kept


def augmented(product, kept):
    product += kept
    return product


def called(product, kept):
    product.add_(kept)
    return product


def test_what_is_added_in_place_makes_a_new_tensor_and_no_call_loses_its_effect():
    x = torch.full((2,), 3.0, requires_grad=True)
    with input_gradients(block := InPlace(augmented)):
        (gradient,) = torch.autograd.grad(block(x).sum(), x)
    assert gradient.tolist() == [2 * 3 + 2 * 4 * 27.0] * 2
    with input_gradients(block := InPlace(called)):
        out = block(x)
        assert out.tolist() == [9 + 2 * 81.0] * 2
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), x)


class Stop(Exception):
    pass


@pytest.mark.parametrize("ending", ["done", "failed", "cancelled"])
@torch.inference_mode()
def test_nothing_of_it_stays(ending, monkeypatch):
    name = "Flux dev"
    model = sharp_family(name)
    inversion = inverted(name, model)
    blocks = list(model.model.diffusion_model.modules())
    weights = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    before = [dict(block.__dict__) for block in blocks], repr(model.model_options), switches()
    plain = edit(name, model, inversion)
    error = comfy.model_management.InterruptProcessingException if ending == "cancelled" else Stop
    if ending == "done":
        edit(name, model, inversion, 0.3)
    else:
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(map_jobs, "MatchedAttention", Failing(error))
            edit(name, model, inversion, 0.3)
    assert all(torch.equal(weight, weights[key]) for key, weight in model.model.state_dict().items())
    after = [dict(block.__dict__) for block in blocks], repr(model.model_options), switches()
    assert [each.keys() for each in after[0]] == [each.keys() for each in before[0]] and after[1:] == before[1:]
    assert torch.equal(edit(name, model, inversion), plain)


class Failing:
    """In place of the function that matches maps."""

    def __init__(self, error):
        self.error = error

    def apply(self, *args):
        raise self.error


def switches():
    kernels = getattr(comfy.quant_ops, "ck", None)
    return comfy.model_management.in_training, getattr(kernels, "rms_rope_split_half", None), torch.is_grad_enabled()


SIX = ["Flux dev", "SD 3", "Chroma", "Qwen-Image", "Lumina 2", "Z-Image"]
TEXT_ROWS = {name: TOKENS for name in SIX} | {"Z-Image": 40}  # with both paddings


@pytest.mark.parametrize("name", SIX)
def test_memory_that_is_counted_from_shapes_holds_what_autograd_keeps(name):
    with torch.inference_mode():
        model = sharp_family(name)
    x_source, x = latents(model)
    for mode in ("none", "blocks"):
        kept = {}

        def keep(tensor, kept=kept):
            if not isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            guider_gradient(model, name, x_source, x, Checkpointing(mode, 1))
        parts = graph_parts(model.model.diffusion_model, tuple(x.shape), mode, 4, TEXT_ROWS[name])
        counted = parts["activations"] + parts["gradients"]
        assert 0.25 * counted <= sum(kept.values()) <= counted


def test_memory_of_flux_at_full_size():
    dit = flux_of_full_size()
    at_1024 = (1, 16, 128, 128), 2, 256
    parts = {mode: graph_parts(dit, at_1024[0], mode, *at_1024[1:]) for mode in ("none", "blocks")}
    in_mb = {mode: {part: round(size / 2**20) for part, size in each.items()} for mode, each in parts.items()}
    assert in_mb == {
        "none": {"activations": 12240, "block": 510, "gradients": 192, "maps": 288},
        "blocks": {"activations": 1096, "block": 510, "gradients": 192, "maps": 288},
    }
    assert [round(reference_memory(dit, at_1024[0], words) / 2**20) for words in (20, 256)] == [30, 384]


def flux_of_full_size():
    """FLUX.1 with nothing in it."""
    from comfy.ldm.flux.model import Flux, FluxParams

    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    sizes = {"hidden_size": 3072, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "vec_in_dim": 768}
    return Flux(**{**LIKE_FLUX, **sizes, "guidance_embed": True, **newer}, **META)
