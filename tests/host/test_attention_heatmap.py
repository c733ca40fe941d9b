"""Heatmaps of words, against maps that hooks on an untouched UNet read."""

import comfy.samplers
import pytest
import torch
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host import running
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.host.views import attention_heat
from pix2pix_zero.host.views.attention_heat import HeatmapSettings, attention_heatmaps, mean_attention
from pix2pix_zero.nodes.attention_heatmap import Pix2PixZeroAttentionHeatmap
from pix2pix_zero.pictures import charts
from pix2pix_zero.pictures.heat import draw_heat
from small_unet import latent, small_model

CAPTION = "a photo of a fluffy cat on grass"
STEPS = 4
HEIGHT, WIDTH = 8, 12
FULL = (0.0, 1.0)


def encode(clip, text):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@torch.inference_mode()
def invert(model, positive, batch=1, **options):
    picture = latent(batch, HEIGHT, WIDTH)
    off = NoiseRegularization(steps=0)
    return invert_latent(model, positive, picture, InversionSettings(STEPS, 0, off, "direct", **options))


@pytest.fixture(scope="module")
def inversion(model, clip):
    return invert(model, encode(clip, CAPTION))


def hooked_maps(model, inversion, level):
    """{(pixels, index): maps [heads, pixels, tokens]} of one UNet call, from forward hooks on its projections."""
    maps, handles = {}, []

    def read(index, attention, q, k):
        split = (side.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for side in (q, k))
        q, k = split
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        maps[q.shape[2], index] = logits.softmax(-1)[0]

    for index, module in enumerate(model.model.diffusion_model.modules()):
        if hasattr(module, "attn2"):
            held = {}
            attention = module.attn2
            handles.append(attention.to_q.register_forward_hook(lambda m, i, o, held=held: held.update(q=o)))

            def finish(m, i, o, held=held, index=index, attention=attention):
                read(index, attention, held["q"], o)

            handles.append(attention.to_k.register_forward_hook(finish))
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": inversion.source})

    def once(model_k, x, sigmas, extra_args, callback, disable):
        x = inversion.trajectory[level]
        sigma = inversion.sigmas[level].expand(len(x))
        comfy.samplers.calc_cond_batch(
            guider.inner_model, [guider.conds["positive"]], x, sigma, extra_args["model_options"]
        )
        return x

    picture = inversion.trajectory[0]
    try:
        sampler = comfy.samplers.KSAMPLER(once)
        guider.sample(torch.zeros_like(picture), picture, sampler, inversion.sigmas.flip(0), disable_pbar=True)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def expected_heat(model, inversion, levels, pixels=None):
    """The mean over heads, layers and levels, each map brought to the latent's size."""
    parts = []
    for level in levels:
        for (count, _), maps in hooked_maps(model, inversion, level).items():
            if pixels not in (None, count):
                continue
            scale = (HEIGHT * WIDTH // count) ** 0.5
            picture = maps.mean(0).T.unflatten(-1, (round(HEIGHT / scale), round(WIDTH / scale)))[None]
            size = (HEIGHT, WIDTH)
            parts.append(torch.nn.functional.interpolate(picture, size, mode="bilinear", align_corners=False))
    return torch.stack(parts).mean(0)


@torch.inference_mode()
@pytest.mark.parametrize("map_memory", [2**30, 0], ids=["kept", "recorded"])
def test_the_heat_is_the_mean_of_the_maps_that_the_unet_draws(model, clip, map_memory):
    inversion = invert(model, encode(clip, CAPTION), map_memory=map_memory)
    heat = mean_attention(model, inversion, 77, FULL, "all")
    torch.testing.assert_close(heat, expected_heat(model, inversion, range(1, STEPS + 1)), rtol=0, atol=2e-5)
    torch.testing.assert_close(heat.sum(1), torch.ones(1, HEIGHT, WIDTH), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_window_and_a_resolution_choose_among_steps_and_layers(model, inversion):
    heat = mean_attention(model, inversion, 77, (0.0, 0.4), "1/2")
    sampling_ = model.get_model_object("model_sampling")
    noisy = [i for i in range(1, STEPS + 1) if inversion.sigmas[i] >= sampling_.percent_to_sigma(0.4)]
    assert 0 < len(noisy) < STEPS
    expected = expected_heat(model, inversion, noisy, HEIGHT * WIDTH // 4)
    torch.testing.assert_close(heat, expected, rtol=0, atol=2e-5)
    assert (heat - mean_attention(model, inversion, 77, FULL, "1/2")).abs().max() > 1e-4
    assert (heat - mean_attention(model, inversion, 77, (0.0, 0.4), "1")).abs().max() > 1e-4


@torch.inference_mode()
def test_maps_of_a_model_patched_later_are_recorded_anew(model, inversion):
    patched = model.clone()
    patched.set_model_attn2_patch(lambda q, k, v, options: (q, 3 * k, v))
    plain, other = (mean_attention(each, inversion, 77, FULL, "all") for each in (model, patched))
    assert (plain - other).abs().max() > 1e-3


def test_the_model_stays_as_it_was(model, clip, inversion):
    options, wrappers = repr(model.model_options), repr(model.wrappers)
    with torch.inference_mode():
        attention_heatmaps(
            model, invert(model, encode(clip, CAPTION), map_memory=0), clip, CAPTION, HeatmapSettings("cat")
        )
    assert (repr(model.model_options), repr(model.wrappers)) == (options, wrappers)
    assert not any(module._forward_hooks for module in model.model.diffusion_model.modules())


def brightness(picture):
    """[height, width] of a heatmap without the line under it."""
    height, width = picture.shape[:2]
    line = max(36, round(width / 14))
    return picture[: height - line].mean(-1)


def test_the_brightest_place_is_where_the_word_is_read(model, clip, inversion, monkeypatch):
    """Heat in known places, for the words' own tokens among the caption's: a, photo, of, a, fluffy, cat ..."""
    heat = torch.full((1, 77, HEIGHT, WIDTH), 0.01)
    tokens = {word: clip.tokenize(CAPTION)["l"][0].index(clip.tokenize(word)["l"][0][1]) for word in ("cat", "grass")}
    heat[0, tokens["cat"], 1, 1] = 0.5
    heat[0, tokens["grass"], 6, 10] = 0.4
    monkeypatch.setattr(attention_heat, "mean_attention", lambda *args: heat)
    pictures = attention_heatmaps(model, inversion, clip, CAPTION, HeatmapSettings("cat\ngrass, cat on grass"))
    assert len(pictures) == 3
    for picture, places in zip(pictures, ([(1, 1)], [(6, 10)], [(1, 1), (6, 10)])):
        bright = brightness(picture)
        pixel = bright.shape[0] / HEIGHT
        for row, column in ((1, 1), (6, 10)):
            there = bright[int((row + 0.5) * pixel), int((column + 0.5) * pixel)]
            assert (there > 0.4) == ((row, column) in places)


def test_without_words_every_word_but_little_ones_gets_a_picture(model, clip, inversion, run_node, monkeypatch):
    labels = []
    text = charts.Sheet.text

    def note(sheet, at, label, *args, **kwargs):
        labels.append(label)
        text(sheet, at, label, *args, **kwargs)

    monkeypatch.setattr(charts.Sheet, "text", note)
    pictures = shown(run_node, model, inversion, clip)
    assert [label for label in labels if "attention" not in label] == ["photo", "fluffy", "cat", "grass"]
    assert pictures.shape[0] == 4


def shown(run_node, model, inversion, clip, caption=(CAPTION,), words=("",), image=None, resolution="all", window=FULL):
    (output,) = run_node(
        Pix2PixZeroAttentionHeatmap,
        model=[model],
        inversion=[inversion],
        clip=[clip],
        caption=list(caption),
        words=list(words),
        start_percent=[window[0]],
        end_percent=[window[1]],
        resolution=[resolution],
        **({} if image is None else {"image": [image]}),
    )
    return output[0] if len(output) == 1 else output


def test_each_picture_of_a_batch_is_shown_with_its_own_caption(model, clip, run_node):
    captions = (CAPTION, "a zebra")
    rows = torch.cat([encode(clip, text)[0][0] for text in captions])
    batch = invert(model, [[rows, {}]], batch=2)
    image = torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    together = shown(run_node, model, batch, clip, captions, ("cat, grass", "zebra"), image)
    assert len(together) == 3
    with torch.inference_mode():
        heat = mean_attention(model, batch, 77, FULL, "all")
    zebra = clip.tokenize("a zebra")["l"][0].index(clip.tokenize("zebra")["l"][0][1])
    expected = draw_heat(heat[1, [zebra]].sum(0), "zebra", image[1], 8)
    assert torch.equal(together[2], charts.as_image(expected))


def test_a_long_caption_is_read_across_its_chunks(model, clip, run_node):
    caption = "a photo of " + "a very big and " * 30 + "fluffy cat"
    inversion = invert(model, encode(clip, caption))
    assert inversion.source[0][0].shape[1] == 154
    assert len(shown(run_node, model, inversion, clip, (caption,), ("cat",))) == 1


def test_the_picture_shows_through(model, clip, inversion, run_node):
    image = torch.zeros(1, 400, 600, 3)
    image[:, :, 300:] = 1.0
    (over,) = shown(run_node, model, inversion, clip, words=("cat",), image=image)
    assert over.shape == (400 + 36, 600, 3)
    bright = brightness(over)
    assert bright[:, 320:].mean() > bright[:, :280].mean() + 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": ("dog",)}, "words: 'dog' is not in the caption.*fluffy, cat"),
        ({"words": ("cat fluffy",)}, "words: 'cat fluffy'"),
        ({"caption": ("",)}, "caption: it is empty"),
        ({"caption": ("a cat " * 60,)}, "caption: it is 154 tokens long.*77"),
        ({"resolution": "1/8"}, "resolution: .*It has it at 1, 1/2"),
        ({"window": (0.6, 0.2)}, "start_percent: 0.6 is later"),
        ({"image": torch.zeros(3, 64, 96, 3)}, "image: it holds 3 pictures"),
    ],
)
def test_what_does_not_fit_is_named(model, clip, inversion, run_node, changes, message):
    with pytest.raises(ValueError, match=message):
        shown(run_node, model, inversion, clip, **changes)


def test_another_caption_is_told_on_the_node_last_of_all(model, clip, inversion, run_node, monkeypatch):
    told = []
    monkeypatch.setattr(running, "show", told.append)
    shown(run_node, model, inversion, clip, caption=("a photo of a fluffy dog on grass",), words=("dog",))
    assert "a fluffy dog on grass' is not the one" in told[-1]
    told.clear()
    shown(run_node, model, inversion, clip, words=("cat",))
    assert not any("not the one" in text for text in told)


def test_an_inversion_of_another_model_is_refused(clip, inversion, run_node):
    with torch.inference_mode():
        other = small_model(seed=5)
    with pytest.raises(ValueError, match="inversion.*another model"):
        shown(run_node, other, inversion, clip)
