"""The shipped demo weights behave as any SD 1.x model in ComfyUI's own nodes."""

from dataclasses import replace

import comfy.sd
import comfy.utils
import pytest
import torch
from pix2pix_zero.demo_model import loader
from pix2pix_zero.demo_model.scene import sample_scene
from pix2pix_zero.demo_model.scene_captions import caption
from pix2pix_zero.demo_model.scene_renders import render, subject_mask
from pix2pix_zero.nodes.demo import Pix2PixZeroDemoModel, Pix2PixZeroDemoScene
from safetensors.torch import load_file, save_file

import nodes

HELD_OUT_SEEDS = range(900_000, 900_024)


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return Pix2PixZeroDemoModel.execute().result


@pytest.fixture
def in_executor():
    with torch.inference_mode():
        yield


def encode(clip, text):
    return nodes.CLIPTextEncode().encode(clip, text)[0]


def draw(model, clip, text, seed=0, steps=4):
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    positive, negative = encode(clip, text), encode(clip, "")
    return nodes.common_ksampler(model, seed, steps, 4.0, "euler", "normal", positive, negative, latent)[0]["samples"]


def scene_images(seeds):
    return torch.stack([torch.from_numpy(render(sample_scene(seed))) for seed in seeds]).float() / 255


def test_the_ksampler_draws_what_the_prompt_asks_for(demo, in_executor):
    model, clip, _ = demo
    cat = draw(model, clip, "a photo of an orange cat")
    assert cat.shape == (1, 4, 16, 16) and cat.isfinite().all()
    assert torch.equal(cat, draw(model, clip, "a photo of an orange cat"))
    assert (cat - draw(model, clip, "a photo of a black dog at night")).abs().mean() > 0.1


def test_the_vae_round_trip_keeps_held_out_pictures(demo, in_executor):
    vae, images = demo[2], scene_images(HELD_OUT_SEEDS)
    latent = nodes.VAEEncode().encode(vae, images)[0]
    assert latent["samples"].shape == (24, 4, 16, 16)
    decoded = nodes.VAEDecode().decode(vae, latent)[0]
    psnr = -10 * (decoded - images).square().mean().log10()
    assert psnr > 30


def test_pictures_of_another_size_go_through(demo, in_executor):
    model, clip, vae = demo
    image = torch.rand(1, 136, 200, 3)
    latent = nodes.VAEEncode().encode(vae, image)[0]
    assert latent["samples"].shape == (1, 4, 17, 25)
    drawn = nodes.common_ksampler(
        model, 0, 2, 4.0, "euler", "normal", encode(clip, "a cat"), encode(clip, ""), latent, denoise=0.5
    )[0]
    assert nodes.VAEDecode().decode(vae, drawn)[0].shape == (1, 136, 200, 3)


def test_a_lora_patch_changes_the_picture_and_leaves_the_model_alone(demo, in_executor):
    model, clip, _ = demo
    before = draw(model, clip, "a cat")
    patched = model.clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    assert patched.add_patches(
        {key: ("diff", (torch.randn(128, 64, generator=torch.Generator().manual_seed(0)),))}
    ) == [key]
    assert (draw(patched, clip, "a cat") - before).abs().mean() > 1e-3
    assert torch.equal(draw(model, clip, "a cat"), before)


def test_a_lora_in_the_usual_format_applies_to_unet_and_text_encoder(demo, in_executor):
    model, clip, _ = demo
    generator = torch.Generator().manual_seed(0)
    sites = {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v": (128, 64),
        "lora_te_text_model_encoder_layers_1_mlp_fc1": (256, 64),
    }
    lora = {}
    for site, (rows, columns) in sites.items():
        lora[f"{site}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 2
        lora[f"{site}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 2
    changed_model, changed_clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    before = draw(model, clip, "a cat")
    assert (draw(changed_model, clip, "a cat") - before).abs().mean() > 1e-3
    assert (draw(model, changed_clip, "a cat") - before).abs().mean() > 1e-3
    assert torch.equal(draw(model, clip, "a cat"), before)


def test_attention_patches_reach_every_cross_attention(demo, in_executor):
    model, clip, _ = demo
    seen = set()

    def record(n, context, value, extra_options):
        seen.add((tuple(extra_options["block"]), n.shape[1]))
        return n, context, value

    patched = model.clone()
    patched.set_model_attn2_patch(record)
    draw(patched, clip, "a cat", steps=1)
    sites = sum(name.endswith("attn2.to_q.weight") for name in model.model.state_dict())
    assert len(seen) == sites == 7
    assert {size for _, size in seen} == {256, 64}


def test_long_and_weighted_prompts_and_unknown_words_encode(demo, in_executor):
    clip = demo[1]
    long = encode(clip, "a photo of an orange cat " * 20)[0][0]
    assert long.shape[1] % 77 == 0 and long.shape[1] > 77 and long.shape[2] == 64
    plain, weighted = encode(clip, "a cat at night")[0][0], encode(clip, "a cat at (night:1.5)")[0][0]
    assert not torch.equal(plain, weighted)
    assert encode(clip, "the zyzzyva, 2 giraffes!")[0][0].isfinite().all()


def test_reloading_gives_the_same_weights(demo):
    model, clip, vae = demo
    for patcher in (model, clip.patcher, vae.patcher):
        make, arguments = patcher.cached_patcher_init
        again = make(*arguments, disable_dynamic=True).model.state_dict()
        for name, tensor in patcher.model.state_dict().items():
            assert torch.equal(again[name], tensor), name


def test_the_file_is_small_and_holds_no_pickle(demo):
    assert loader.WEIGHTS.stat().st_size <= 14_000_000
    assert load_file(loader.WEIGHTS)[loader.SCALE_FACTOR].ndim == 0


@pytest.mark.parametrize(
    ("prefix", "part"),
    [(loader.UNET_PREFIX, "UNet"), (loader.TEXT_PREFIX, "text encoder"), (loader.VAE_PREFIX, "autoencoder")],
)
@pytest.mark.parametrize("fault", ["missing", "left over", "misshaped"])
def test_a_key_too_few_or_too_many_is_refused(tmp_path, prefix, part, fault):
    weights = load_file(loader.WEIGHTS)
    key = next(k for k in weights if k.startswith(prefix) and k.endswith("weight"))
    if fault == "missing":
        del weights[key]
    elif fault == "left over":
        weights[f"{prefix}extra.weight"] = torch.zeros(1)
    else:
        weights[key] = torch.zeros(3)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=f"do not fit its {part}: {fault}"):
        loader.load_demo_model(tmp_path / "weights.safetensors")


def test_tensors_of_no_part_are_refused(tmp_path):
    weights = load_file(loader.WEIGHTS)
    save_file({**weights, "stranger": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="left over.*stranger"):
        loader.load_demo_model(tmp_path / "weights.safetensors")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="weights are missing: .*nothing.safetensors"):
        loader.load_demo_model(tmp_path / "nothing.safetensors")


def test_the_scene_node_hands_out_picture_mask_and_caption(run_node):
    knobs = {
        "fur": "black",
        "glasses": "yes",
        "time_of_day": "night",
        "season": "winter",
        "style": "flat",
        "pose": "sitting",
    }
    image, mask, text = run_node(Pix2PixZeroDemoScene, subject="dog", seed=2**64 - 1, **knobs)
    scene = sample_scene(2**64 - 1, subject="dog")
    scene = replace(scene, fur="black", glasses=True, night=True, winter=True, style="flat", pose="sitting")
    assert torch.equal((image[0] * 255).round().byte(), torch.from_numpy(render(scene)))
    assert torch.equal(mask[0] > 0.5, torch.from_numpy(subject_mask(scene)))
    assert text == caption(scene) == "a photo of a black dog wearing glasses in winter at night"
