"""Odd inputs in API prompts to a real server: what cannot be drawn is told on the node, by its socket; the rest is drawn."""

import io
import math

import numpy as np
import pytest
from PIL import Image
from pix2pix_zero.devtools.graphs import Graph
from pix2pix_zero.devtools.server import GraphError

CAPTION, TARGET = "a photo of a cat", "a photo of a dog"


class Edit:
    """A small edit as an API prompt, with a handle for each of its nodes."""

    def __init__(self):
        self.graph = Graph()
        add = self.graph.add
        self.model, self.scene = add("Pix2PixZeroDemoModel"), add("Pix2PixZeroDemoScene", subject="cat", seed=3)
        self.picture = add(
            "ImageScale", image=self.scene[0], upscale_method="area", width=64, height=64, crop="disabled"
        )
        self.latent = add("VAEEncode", pixels=self.picture[0], vae=self.model[2])
        self.caption, self.target = (add("CLIPTextEncode", clip=self.model[1], text=text) for text in (CAPTION, TARGET))
        self.inversion = add(
            "Pix2PixZeroInversion",
            model=self.model[0],
            positive=self.caption[0],
            latent_image=self.latent[0],
            steps=2,
            seed=0,
        )
        self.edit = add(
            "Pix2PixZeroKSampler",
            model=self.model[0],
            inversion=self.inversion[0],
            positive=self.target[0],
            negative=self.caption[0],
        )
        self.shown = add("PreviewImage", images=add("VAEDecode", samples=self.edit[0], vae=self.model[2])[0])

    def run(self, server, *shown) -> np.ndarray:
        """The pictures of the first node shown: all [B, H, W, 3] in 0..255."""
        shown = shown or (self.shown,)
        self.graph.keep(*shown)
        outputs = server.run(self.graph.api(server.object_info()))
        pngs = [server.view(picture) for picture in outputs[shown[0].key]["images"]]
        return np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float) for png in pngs])


def change(name: str, **values):
    return lambda edit: edit.graph.change(getattr(edit, name), **values)


def limited_caption(edit):
    part = edit.graph.add("ConditioningSetTimestepRange", conditioning=edit.caption[0], start=0.0, end=0.4)
    edit.graph.change(edit.inversion, positive=part[0])


def overflowing(edit, latent):
    for _ in range(40):
        latent = edit.graph.add("LatentMultiply", samples=latent, multiplier=10.0)[0]
    return latent


def infinite_latent(edit):
    edit.graph.change(edit.inversion, latent_image=overflowing(edit, edit.latent[0]))


def masks_that_do_not_go_round(edit):
    three = edit.graph.add("RepeatLatentBatch", samples=edit.latent[0], amount=3)
    picture = edit.graph.add("RepeatImageBatch", image=edit.picture[0], amount=2)
    mask = edit.graph.add("ImageToMask", image=picture[0], channel="red")
    edit.graph.change(edit.inversion, latent_image=three[0])
    edit.graph.change(edit.edit, mask=mask[0])


def another_kind_of_model(edit):
    flow = edit.graph.add("ModelSamplingSD3", model=edit.model[0], shift=1.0)
    edit.graph.change(edit.edit, model=flow[0])


def prompt_to_prompt(edit, **values):
    inputs = {"model": edit.model[0], "inversion": edit.inversion[0], "clip": edit.model[1]}
    return edit.graph.add("Pix2PixZeroPromptToPrompt", **{**inputs, "source": CAPTION, "target": TARGET, **values})


def two_edits_of_a_model(edit):
    edit.graph.change(edit.edit, model=prompt_to_prompt(edit)[0])


def longer_caption(edit):
    prompted = prompt_to_prompt(edit, source=" ".join([CAPTION] * 40))
    edit.graph.change(edit.edit, positive=prompted[1])


def stock_sampler_that_overflows(edit):
    prompted = prompt_to_prompt(edit)
    noise = overflowing(edit, edit.inversion[1])
    inputs = {"model": prompted[0], "positive": prompted[1], "negative": edit.caption[0], "latent_image": noise}
    settings = dict(noise_seed=0, steps=2, cfg=1.5, sampler_name="euler", scheduler="normal", add_noise="disable")
    window = dict(start_at_step=0, end_at_step=2, return_with_leftover_noise="disable")
    sampled = edit.graph.add("KSamplerAdvanced", **inputs, **settings, **window)
    decoded = edit.graph.add("VAEDecode", samples=sampled[0], vae=edit.model[2])
    edit.graph.change(edit.shown, images=decoded[0])


def heat_of_another_word(edit):
    inputs = {"model": edit.model[0], "inversion": edit.inversion[0], "clip": edit.model[1]}
    heat = edit.graph.add("Pix2PixZeroAttentionHeatmap", **inputs, caption=CAPTION, words="zebra")
    edit.graph.change(edit.shown, images=heat[0])


def direction(**values):
    def put(edit):
        found = edit.graph.add(
            "Pix2PixZeroEditDirection", clip=edit.model[1], **{"source": "cat", "target": "dog", **values}
        )
        moved = edit.graph.add(
            "Pix2PixZeroApplyDirection", conditioning=edit.caption[0], direction=found[0], strength=1.0
        )
        edit.graph.change(edit.edit, positive=moved[0])

    return put


def saved_direction(name):
    def put(edit):
        found = edit.graph.add("Pix2PixZeroLoadDirection", direction_name=name)
        moved = edit.graph.add(
            "Pix2PixZeroApplyDirection", conditioning=edit.caption[0], direction=found[0], strength=1.0
        )
        edit.graph.change(edit.edit, positive=moved[0])

    return put


def linked_choice(edit):
    edit.graph.change(edit.edit, preset=edit.graph.add("PrimitiveString", value="quick")[0])


def text_of_another_encoder(edit):
    zeroed = edit.graph.add("ConditioningZeroOut", conditioning=edit.caption[0])
    edit.graph.change(edit.caption, text="")
    edit.graph.change(edit.edit, positive=zeroed[0])


REFUSED = {
    "cfg that is no number": (change("edit", cfg=math.nan), r"KSampler.*cfg: nan is not a number"),
    "infinite guidance": (change("edit", guidance_strength=math.inf), r"KSampler.*guidance_strength"),
    "more steps than the model has": (change("inversion", steps=1001), r"Inversion.*steps"),
    "a latent for an inversion": (
        lambda edit: edit.graph.change(edit.edit, inversion=edit.latent[0]),
        r"KSampler.*inversion, received_type\(LATENT\)",
    ),
    "a choice by a link": (linked_choice, r"KSampler.*preset, received_type\(STRING\)"),
    "a choice that is none": (change("edit", preset="quick"), r"KSampler.*preset: 'quick' not in"),
    "a window that ends before it begins": (
        change("edit", start_percent=0.8, end_percent=0.2),
        r"KSampler.*start_percent: 0.8 is later than end_percent",
    ),
    "a caption for a part of the sampling": (limited_caption, r"Inversion.*positive: it is limited to a part"),
    "an infinite latent": (infinite_latent, r"Inversion.*latent_image: it holds NaN or infinite values"),
    "two masks for three pictures": (masks_that_do_not_go_round, r"KSampler.*mask: it brings 2 masks for 3 pictures"),
    "a flow model for an inversion that diffused": (
        another_kind_of_model,
        r"KSampler.*inversion: it was made with a model",
    ),
    "Prompt-to-Prompt in the guided sampler": (
        two_edits_of_a_model,
        r"KSampler.*model: a Prompt-to-Prompt edit is sampled",
    ),
    "a source of another length": (longer_caption, r"PromptToPrompt.*source: it is \d+ tokens long"),
    "noise that overflows in a stock sampler": (
        stock_sampler_that_overflows,
        r"KSamplerAdvanced.*NaN or infinite values",
    ),
    "a word that the caption lacks": (heat_of_another_word, r"AttentionHeatmap.*words: .*zebra"),
    "half a character": (direction(source="cat \ud83d"), r"EditDirection.*source: letter 5 is half a character"),
    "a concept that stays": (direction(target=" CAT "), r"EditDirection.*target: \"CAT\" says the same"),
    "no concept": (direction(source=" \n"), r"EditDirection.*source: "),
    "a file outside the folder": (saved_direction("../../../etc/passwd"), r"LoadDirection.*direction_name"),
}
DRAWN = {
    "numbers in texts": change("edit", cfg="1.5", guidance_strength="0.1"),
    "no mask, said so": change("edit", mask=None),
    "an unknown input": change("edit", no_such_input=3),
    "a picture of 32 pixels": change("picture", width=32, height=32),
    "a picture of odd sides": change("picture", width=61, height=97),
    "no text at all": change("target", text=""),
    "a text that was zeroed out": text_of_another_encoder,
    "emoji and other scripts": change("target", text="👩‍👩‍👧 猫 قطة (((" * 40),
    "strength beyond use": change("edit", guidance_strength=1.0, cfg=30.0),
}


@pytest.mark.parametrize("odd", REFUSED)
def test_what_cannot_be_drawn_is_told_by_its_socket(server, odd):
    put, words = REFUSED[odd]
    edit = Edit()
    put(edit)
    with pytest.raises(GraphError, match=f"(?s){words}") as told:
        edit.run(server)
    assert "Traceback" not in str(told.value)


@pytest.mark.parametrize("odd", DRAWN)
def test_what_can_be_drawn_is_a_picture(server, odd):
    edit = Edit()
    DRAWN[odd](edit)
    picture = edit.run(server)
    assert picture.std() > 1.0, "neither black nor of one colour"
