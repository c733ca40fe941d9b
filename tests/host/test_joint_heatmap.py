"""What diffusion transformers read of each word: against a softmax in float64, and the rows that are a word's."""

import pytest
import torch
from comfy.model_patcher import create_model_options_clone
from flow_encoders import small_encoder
from flow_families import FAMILIES, TOKENS, picture, small_family, texts
from joint_runs import FIRST_ROW, FIRST_WORD, PATCH, Seen, evaluate
from pix2pix_zero.attention_patches.joint import joint_sites
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.host.text.caption_rows import caption_words
from pix2pix_zero.host.views.attention_heat import HeatmapSettings, attention_heatmaps, mean_attention

NAMES = [name for name, family in FAMILIES.items() if family.known]
APART = ("Wan 2.1", "Anima", "Kandinsky 5")


@torch.inference_mode()
def expected_heat(model, name, latent, sigma, words):
    """The mean of all blocks and heads of softmax(q k^T / sqrt(d)) in float64, from what another pack's attention sees."""
    seen = Seen()
    options = create_model_options_clone(seen.patch(model).model_options)
    evaluate(model, name, latent, options, sigma=sigma)
    count = 96 // PATCH[name] ** 2
    blocks = len(joint_sites(model.model.diffusion_model))
    reads = [c for c in seen.calls if c[0].shape[1] != c[1].shape[1]] if name in APART else []
    reads = reads or [c for c in seen.calls if c[0].shape[1] == c[1].shape[1] and c[0].shape[1] > count]
    maps = []
    for q, k, _, _, heads in reads[-blocks:]:
        q, k = (tensor.double().unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        rows = slice(FIRST_ROW[name], FIRST_ROW[name] + count)
        maps.append(weights[:, :, rows, FIRST_WORD[name] : FIRST_WORD[name] + words].mean(1))
    height = 8 // PATCH[name]
    return torch.stack(maps).mean(0).mT.unflatten(-1, (height, -1))


@pytest.mark.works("Attention Heatmap", family=FAMILIES)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_the_heat_is_the_softmax_over_all_keys_in_the_columns_of_the_text(name):
    model = small_family(name)
    words = 6 if name == "Anima" else TOKENS  # whose text is read as T5's six tokens
    inversion = invert_latent(model, texts(name, 1), picture(model), InversionSettings(2))
    heat = mean_attention(model, inversion, words, (0.0, 0.01), "all")
    latent, sigma = inversion.trajectory[-1], float(inversion.sigmas[-1])
    expected = expected_heat(model, name, latent, sigma, words)
    expected = torch.nn.functional.interpolate(expected, (8, 12), mode="bilinear", align_corners=False)
    assert heat.shape == expected.shape == (1, words, 8, 12)
    assert (heat - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["SD 3", "Flux", "AuraFlow", "Qwen-Image", "HiDream"])
@torch.inference_mode()
def test_the_rows_of_a_word_are_those_of_the_tokens_that_change_with_it(name):
    clip, caption = small_encoder(name), "a photo of a cat, on the red sofa"
    cond = clip.encode_from_tokens(clip.tokenize(caption))
    read = caption_words(clip, caption, cond.shape[1], "caption")
    assert [word.text for word in read.words] == ["a", "photo", "of", "a", "cat", "on", "the", "red", "sofa"]
    sides = [clip.tokenize(text) for text in (caption, caption.replace("cat", "dog"), caption.replace("red", "blue"))]
    flat = [{key: [token[0] for row in rows for token in row] for key, rows in side.items()} for side in sides]
    for other, word in ((flat[1], read.words[4]), (flat[2], read.words[7])):
        moved = {key: [i for i, t in enumerate(tokens) if t != other[key][i]] for key, tokens in flat[0].items()}
        if name == "SD 3":
            wanted = moved["l"] + [77 + i for i in moved["t5xxl"]]
        else:
            key = next(key for key in ("t5xxl", *moved) if key in moved and len(flat[0][key]) >= cond.shape[1])
            wanted = [i - len(flat[0][key]) + cond.shape[1] for i in moved[key]]
        assert list(word.positions) == wanted != []


@torch.inference_mode()
def test_the_node_draws_a_picture_for_each_word():
    clip, model = small_encoder("SD 3"), small_family("SD 3")
    caption = "a photo of a cat"
    text = [[clip.encode_from_tokens(clip.tokenize(caption)), {"pooled_output": torch.randn(1, 2048)}]]
    inversion = invert_latent(model, text, picture(model), InversionSettings(2))
    drawn = attention_heatmaps(model, inversion, clip, caption, HeatmapSettings())
    assert len(drawn) == 2 and (drawn[0] != drawn[1]).any()
    assert len(attention_heatmaps(model, inversion, clip, caption, HeatmapSettings("a cat"))) == 1
    with pytest.raises(ValueError, match="^words: 'dog' is not in the caption"):
        attention_heatmaps(model, inversion, clip, caption, HeatmapSettings("dog"))
    with pytest.raises(ValueError, match="^resolution: .* It has it at 1/2"):
        attention_heatmaps(model, inversion, clip, caption, HeatmapSettings(resolution="1/4"))
    with pytest.raises(ValueError, match="^clip: how its rows belong to words is not known"):
        attention_heatmaps(model, inversion, small_encoder("Qwen-Image"), caption, HeatmapSettings())
    model.set_model_unet_function_wrapper(lambda apply, args: torch.zeros_like(args["input"]))
    with pytest.raises(ValueError, match="model: another node .* leaves out UNet calls"):
        attention_heatmaps(model, inversion, clip, caption, HeatmapSettings())
