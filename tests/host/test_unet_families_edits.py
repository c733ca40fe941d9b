"""What families need beside a text: SDXL's pooled vectors, further input channels; and the sister methods on their UNets."""

import comfy_extras.nodes_custom_sampler as stock
import pytest
import torch
from families import WIDTH, few_transformers, further_channels, picture, small_family, texts
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.methods import prompt_to_prompt
from pix2pix_zero.host.methods.plug_and_play import with_source_features
from pix2pix_zero.host.methods.prompt_to_prompt import PromptEditSettings, edit_by_prompt
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent, inverted_noise
from pix2pix_zero.host.sampling.passes import UNetPasses
from pix2pix_zero.host.text.conditionings import beside_the_source, check_width
from pix2pix_zero.nodes.directions import Pix2PixZeroApplyDirection, Pix2PixZeroEditDirectionFromSentences
from tiny_clip import WIDTH_G, WIDTH_L, tiny_clip

from nodes import CLIPTextEncode

OFF = NoiseRegularization(steps=0)
SIDES = ("source_sentences", "target_sentences")


@torch.inference_mode()
def invert(model, source, steps=2, **options):
    return invert_latent(model, source, picture(model), InversionSettings(steps, 5, OFF, **options))


@torch.inference_mode()
def edit(model, inversion, positive, negative, strength=0.01, **options):
    return sample_edit(model, inversion, positive, negative, EditSettings(2.0, strength, **options))[0]


@torch.inference_mode()
def sample(model, inversion, positive, negative):
    """With stock nodes, from the inversion's noise."""
    (guider,) = stock.CFGGuider.execute(model, positive, negative, 2.0).result
    (nothing,) = stock.DisableNoise.execute().result
    (sampler,) = stock.KSamplerSelect.execute("euler").result
    noise = {"samples": inverted_noise(inversion, model)}
    outputs = stock.SamplerCustomAdvanced.execute(nothing, guider, sampler, inversion.sigmas.flip(0), noise)
    return outputs.result[0]["samples"]


class Inputs:
    """What the UNet is called with while it is active, each row apart: (x, text, label)."""

    def __init__(self, model):
        self.unet = model.model.diffusion_model
        self.rows = []

    def __enter__(self):
        def note(unet, args, kwargs):
            labels = [None] * len(args[0]) if kwargs.get("y") is None else kwargs["y"]
            self.rows += [tuple(tensors) for tensors in zip(args[0].detach(), kwargs["context"], labels)]

        self.handle = self.unet.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def labels_of(self, text):
        return [label for _, context, label in self.rows if torch.equal(context, text[0])]


@pytest.fixture(scope="module")
def sdxl():
    """A MODEL of the SDXL kind with few blocks, and a CLIP of two small encoders that fits it."""
    with torch.inference_mode():
        return small_family("vega", WIDTH_L + WIDTH_G, WIDTH_G, **few_transformers("vega", 1)), tiny_clip("sdxl")


def encode(clip, text):
    with torch.inference_mode():
        return CLIPTextEncode().encode(clip, text)[0]


@pytest.mark.parametrize("family", ["sdxl-pix2pix", "sdxl-refiner"])
def test_a_text_without_its_pooled_vector_is_named(family):
    with torch.inference_mode():
        model = small_family(family)
    check_width(model, texts(family), "positive")
    with pytest.raises(ValueError, match="^positive: it has no pooled text of"):
        check_width(model, [[text, {}] for text, _ in texts(family)], "positive")


def test_an_sdxl_edit_moves_the_text_and_the_pooled_vector(sdxl, run_node):
    model, clip = sdxl
    caption = encode(clip, "a photo of a cat")
    sentences = dict(zip(SIDES, ("a cat\na black cat", "a dog\na black dog")))
    (direction,) = run_node(Pix2PixZeroEditDirectionFromSentences, clip=clip, **sentences)
    (positive,) = run_node(Pix2PixZeroApplyDirection, conditioning=caption, direction=direction, strength=1.5)
    pooled, moved = (conditioning[0][1]["pooled_output"] for conditioning in (caption, positive))
    shift = 1.5 * direction.tensors["pooled_output"]
    assert shift.norm() > 0.01 * pooled.norm()
    torch.testing.assert_close(moved, pooled + shift)
    torch.testing.assert_close(positive[0][0], caption[0][0] + 1.5 * direction.tensors["cond"])
    inversion = invert(model, caption)
    with Inputs(model) as inputs:
        edited = edit(model, inversion, positive, caption)
    sides = torch.cat(
        [model.model.embedder(torch.tensor([8.0 * side])).flatten() for side in (8, WIDTH, 0, 0, 8, WIDTH)]
    )
    for text, vector in ((caption, pooled), (positive, moved)):
        labels = inputs.labels_of(text[0][0])
        assert labels and all(torch.equal(label, torch.cat([vector[0], sides])) for label in labels)
    by_text_alone = [[positive[0][0], caption[0][1]]]
    assert (edited - edit(model, inversion, by_text_alone, caption)).std() > 1e-4 * edited.std()


def test_the_refiners_encoder_has_directions_of_its_own(run_node):
    with torch.inference_mode():
        clip = tiny_clip("refiner")
    sentences = ["a cat\na black cat", "a dog\na black dog"]
    (direction,) = run_node(Pix2PixZeroEditDirectionFromSentences, clip=clip, **dict(zip(SIDES, sentences)))
    means = []
    for side in sentences:
        encoded = [encode(clip, sentence)[0] for sentence in side.splitlines()]
        texts, pooled = zip(*((cond, options["pooled_output"]) for cond, options in encoded))
        means.append({"cond": torch.cat(texts).mean(0, True), "pooled_output": torch.cat(pooled).mean(0, True)})
    assert direction.tensors["cond"].shape == (1, 77, WIDTH_G)
    for name, tensor in direction.tensors.items():
        assert tensor.norm() > 0.01
        torch.testing.assert_close(tensor, means[1][name] - means[0][name], rtol=0, atol=1e-5)


def test_sizes_that_a_text_names_reach_inversion_and_edit(sdxl):
    model, clip = sdxl
    caption = [[cond, {**options, "width": 512, "crop_h": 64}] for cond, options in encode(clip, "a cat")]
    with Inputs(model) as inputs:
        inversion = invert(model, caption)
        again = edit(model, inversion, caption, caption)
    sides = [8 * 8, 512, 64, 0, 8 * 8, 512]
    expected = torch.cat([model.model.embedder(torch.tensor([float(side)])).flatten() for side in sides])
    assert all(torch.equal(label[WIDTH_G:], expected) for _, _, label in inputs.rows)
    source = picture(model)["samples"]
    assert (again - source).abs().max() <= 1e-3 * source.std()


@pytest.mark.parametrize("same", [True, False])
def test_where_the_edit_acts_is_told_from_the_negative_only_if_it_is_the_source(sdxl, same, monkeypatch):
    model, clip = sdxl
    caption = encode(clip, "a photo of a cat")
    negative = caption if same else [[cond, {**options, "width": 256}] for cond, options in caption]
    inversion = invert(model, caption)
    evaluated, evaluate = [], UNetPasses.denoise_branch
    monkeypatch.setattr(
        UNetPasses,
        "denoise_branch",
        lambda self, branch, *args: evaluated.append(branch) or evaluate(self, branch, *args),
    )
    edit(model, inversion, encode(clip, "a photo of a dog"), negative, local_blend=0.2)
    assert (evaluated == []) == same


@pytest.mark.parametrize("family", ["sd15-inpaint", "sd15-pix2pix"])
def test_further_channels_are_carried_from_the_source(family):
    with torch.inference_mode():
        model = small_family(family)
    source, positive, negative = (texts(family, seed) for seed in range(3))
    inversion = invert(model, source)
    with Inputs(model) as inputs:
        expected = edit(model, inversion, positive, negative)
    without = [[[conditioning[0][0], {}]] for conditioning in (positive, negative)]
    assert torch.equal(edit(model, inversion, *without), expected)
    assert all(torch.equal(x[4:], inputs.rows[0][0][4:]) for x, _, _ in inputs.rows)
    assert inputs.rows[0][0][4:].std() > 0.1
    others = {"concat_latent_image": -further_channels(family)["concat_latent_image"]}
    own = [[positive[0][0], {**further_channels(family), **others}]]
    assert (edit(model, inversion, own, negative) - expected).std() > 1e-3 * expected.std(), (
        "the edit's own count first"
    )


def test_an_inpainting_mask_keeps_the_picture_outside_it():
    with torch.inference_mode():
        model = small_family("sd15-inpaint")
    source, positive = texts("sd15-inpaint"), texts("sd15-inpaint", seed=1)
    mask = further_channels("sd15-inpaint")["concat_mask"]
    latent = {**picture(model), "noise_mask": mask}
    with torch.inference_mode():
        inversion = invert_latent(model, source, latent, InversionSettings(2, 5, OFF))
    change = (edit(model, inversion, positive, source) - latent["samples"]).abs().amax(1)
    assert change[mask == 0].max() <= 1e-4
    assert change[mask == 1].max() > 0.1


def test_what_the_edit_says_itself_is_left_as_it_is():
    source = [[torch.zeros(1, 2, 3), {"concat_latent_image": "source's", "concat_mask": "source's", "width": 8}]]
    other = [[torch.ones(1, 2, 3), {"concat_latent_image": "own"}]]
    assert beside_the_source(other, source, "positive") == other
    (_, options), *_ = beside_the_source([[torch.ones(1, 2, 3), {}]], source, "positive")
    assert options == {"concat_latent_image": "source's", "concat_mask": "source's"}
    (_, options), *_ = beside_the_source([[torch.zeros(1, 2, 3), {}]], [[torch.zeros(1, 2, 3), {}]], "negative")
    assert options == {"prompt_type": "positive"}
    assert source[0][1].keys() == {"concat_latent_image", "concat_mask", "width"}


def test_a_negative_of_another_number_of_parts_takes_what_all_parts_of_the_source_share():
    def part(value):
        return [torch.zeros(1, 2, 3), {"concat_mask": torch.full((1, 8, 8), value)}]

    negative = [[torch.ones(1, 2, 3), {}]]
    ((_, options),) = beside_the_source(negative, [part(0.5), part(0.5)], "negative")
    assert torch.equal(options["concat_mask"], part(0.5)[1]["concat_mask"])
    with pytest.raises(ValueError, match="negative: .*different pictures to inpaint"):
        beside_the_source(negative, [part(0.5), part(1.0)], "negative")


@pytest.mark.works("Plug-and-Play")
@pytest.mark.parametrize("family", ["sd21-v", "sdxl", "koala-700m", "sdxs-09", "sd15-inpaint", "unclip-h"])
def test_plug_and_play_draws_with_the_layout_of_the_picture(family):
    with torch.inference_mode():
        model = small_family(family, **few_transformers(family))
        source, positive = texts(family), texts(family, seed=1)
        inversion = invert(model, source, method="ddim")
        patched = with_source_features(model, inversion, 0.5, 0.5)
    edited, plain = sample(patched, inversion, positive, source), sample(model, inversion, positive, source)
    assert edited.isfinite().all()
    assert (edited - plain).std() > 1e-4 * plain.std()


@pytest.mark.works("Prompt-to-Prompt")
@pytest.mark.parametrize(
    ("family", "kind"), [("sdxl", "sdxl"), ("koala-700m", "sdxl"), ("sd15-inpaint", "sd1"), ("sdxs-09", "sd1")]
)
def test_prompt_to_prompt_edits_by_words(family, kind):
    clip = tiny_clip(kind)
    width, pooled = (WIDTH_L + WIDTH_G, WIDTH_G) if kind == "sdxl" else (WIDTH_L, None)
    with torch.inference_mode():
        model = small_family(family, width, pooled, **few_transformers(family))
        caption = [[cond, {**options, **further_channels(family)}] for cond, options in encode(clip, "a cat on a sofa")]
        inversion = invert(model, caption)
        patched, positive = edit_by_prompt(
            model, inversion, clip, "a cat on a sofa", "a dog on a sofa", PromptEditSettings(0.5, 1.0)
        )
        unpatched = sample(model, inversion, positive, caption)
        edited = sample(patched, inversion, positive, caption)
        same, unedited = edit_by_prompt(
            model, inversion, clip, "a cat on a sofa", "a cat on a sofa", PromptEditSettings(0.5, 1.0)
        )
        again = sample(same, inversion, unedited, caption)
    assert edited.isfinite().all()
    assert (edited - unpatched).std() > 1e-4 * unpatched.std()
    source = picture(model)["samples"]
    assert (again - source).abs().max() <= 1e-3 * source.std()


def test_prompt_to_prompt_takes_self_attention_only_where_there_is_some(monkeypatch):
    """Some UNets attend to the text twice: there the source's keys are those of its text, and not of the picture."""
    clip, taken = tiny_clip("sd1"), []

    class Noting(prompt_to_prompt.SourceAttention):
        def __init__(self, places, tokens):
            taken.extend(places)
            super().__init__(places, tokens)

    monkeypatch.setattr(prompt_to_prompt, "SourceAttention", Noting)
    with torch.inference_mode():
        model = small_family("sdxs-09", WIDTH_L, disable_self_attentions=[True, True, False])
        caption = encode(clip, "a cat")
        inversion = invert(model, caption)
        patched, positive = edit_by_prompt(model, inversion, clip, "a cat", "a dog", PromptEditSettings(0.0, 1.0))
        sample(patched, inversion, positive, caption)
    assert {site.block for _, site in taken} == {"input", "output"}
    for kind, site in taken:
        block = getattr(model.model.diffusion_model, f"{site.block}_blocks")[site.number][1]
        assert kind == "attn1" and not block.transformer_blocks[site.index].disable_self_attn
