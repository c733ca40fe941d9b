"""Directions where texts have no fixed length: the caption is encoded again with the words exchanged, for every encoder."""

import functools
from dataclasses import replace

import pytest
import torch
from flow_encoders import ENCODERS, small_encoder
from pix2pix_zero.editing.directions import combine
from pix2pix_zero.host.text.conditionings import WORDS
from pix2pix_zero.host.text.direction_files import save_direction
from pix2pix_zero.host.text.text_encoding import chunk_length, find_direction
from pix2pix_zero.nodes.directions import Pix2PixZeroApplyDirection, Pix2PixZeroEditDirection
from tiny_clip import tiny_clip

CAPTION = 'a photo of a cat on a bench, with the words "old cat in town"'
EXCHANGED = 'a photo of a dog on a bench, with the words "old dog in town"'
LONGER = 'a photo of a fluffy orange cat on a bench, with the words "old fluffy orange cat in town"'


@pytest.fixture(params=ENCODERS)
def clip(request):
    return small_encoder(request.param)


@functools.cache
@torch.inference_mode()
def encoded(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@functools.cache
def direction(clip, target="dog"):
    return find_direction(clip, ["cat", "a cat"], [target, f"a {target}"], "cat", target)


@pytest.fixture(scope="module", autouse=True)
def encoders_are_released():
    yield
    encoded.cache_clear()
    direction.cache_clear()


@torch.inference_mode()
def applied(clip, strength, target="dog", caption=CAPTION, conditioning=None, edit=None):
    conditioning = encoded(clip, CAPTION) if conditioning is None else conditioning
    edit = direction(clip, target) if edit is None else edit
    return Pix2PixZeroApplyDirection.execute(conditioning, edit, strength, clip, caption).result[0]


def tensors(conditioning):
    ((cond, options),) = conditioning
    return {"cond": cond, **{name: value for name, value in options.items() if torch.is_tensor(value)}}


def assert_equal(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_texts_have_no_fixed_length_and_a_direction_is_its_words(clip):
    assert chunk_length(clip) is None
    edit = Pix2PixZeroEditDirection.execute(clip, "cat", "dog").result[0]
    assert edit.words_only and edit.exchanges == (("cat", "dog", 1.0),)


@pytest.mark.parametrize(("target", "text"), [("dog", EXCHANGED), ("fluffy orange cat", LONGER)])
def test_no_strength_is_the_caption_and_full_strength_the_exchanged_caption(clip, target, text):
    assert_equal(applied(clip, 0.0, target), encoded(clip, CAPTION))
    assert_equal(applied(clip, 1.0, target), encoded(clip, text))


def test_half_way_each_row_is_the_mean_of_both_captions(clip):
    """Both captions have as many tokens, so that a row and its counterpart stand at the same place."""
    half, start, end = (
        tensors(text) for text in (applied(clip, 0.5), encoded(clip, CAPTION), encoded(clip, EXCHANGED))
    )
    assert half.keys() == end.keys()
    for name, tensor in half.items():
        if tensor.ndim == 1 or not tensor.is_floating_point():  # token numbers and masks
            assert torch.equal(tensor, end[name])
        else:
            assert not torch.equal(start[name], end[name])
            rows = 5 if name == "conditioning_llama3" else None  # there a dog has more tokens than a cat
            mean = (start[name] + end[name]) / 2
            torch.testing.assert_close(tensor[..., :rows, :], mean[..., :rows, :])


def test_the_rows_of_the_captions_words_are_told_and_those_of_template_and_padding_are_not():
    clip = small_encoder("Flux")
    ((_, options),) = applied(clip, 1.0, "fluffy orange cat")
    sides = [
        [clip.tokenizer.t5xxl.untokenize([token])[0][1] for token in clip.tokenize(text)["t5xxl"][0]]
        for text in (CAPTION, LONGER)
    ]
    pairs = [tuple(side[row] for side, row in zip(sides, pair)) for pair in options[WORDS][0]]
    assert all(one == other for one, other in pairs)
    spelled = "".join(one for one, _ in pairs).replace("\u2581", "")
    assert spelled == "".join(letter for letter in CAPTION if letter.isalpha())


def test_every_encoder_tells_words_and_no_more(clip):
    ((text, options),) = applied(clip, 1.0)
    if WORDS in options:
        (pairs,) = options[WORDS]
        assert 15 <= len(pairs) <= 40 and len({row for row, _ in pairs}) == len(pairs)
    ((_, unmoved),) = applied(clip, 0.0)
    assert WORDS not in unmoved


@torch.inference_mode()
def test_options_and_rows_of_a_conditioning_stay():
    clip = small_encoder("Flux")
    ((cond, options),) = encoded(clip, CAPTION)
    picture = torch.ones(1)
    conditioning = [[cond.expand(2, -1, -1), {**options, "guidance": 2.5, "reference_latents": [picture]}]]
    ((moved, kept),) = applied(clip, 1.0, conditioning=conditioning)
    assert torch.equal(moved, encoded(clip, EXCHANGED)[0][0].expand(2, -1, -1))
    assert kept["guidance"] == 2.5 and kept["reference_latents"][0] is picture


def test_an_sd_caption_can_be_encoded_again_as_well():
    clip = tiny_clip("sd1")
    edit = find_direction(clip, ["cat"], ["dog"], "cat", "dog")
    assert not edit.words_only
    assert_equal(applied(clip, 1.0, edit=edit), encoded(clip, EXCHANGED))


def test_several_edits_are_exchanged_together_if_they_weigh_the_same():
    clip = small_encoder("Flux")
    edits = direction(clip), find_direction(clip, ["bench"], ["sofa"], "bench", "sofa")
    assert_equal(applied(clip, 1.0, edit=combine(*edits, 1.0, 1.0)), encoded(clip, EXCHANGED.replace("bench", "sofa")))
    with pytest.raises(ValueError, match="^direction: .*different weights"):
        applied(clip, 1.0, edit=combine(*edits, 1.0, 0.5))


def test_edits_found_by_an_encoder_in_two_precisions_are_exchanged_together():
    """They are words, whatever the weights were rounded to; those of another kind of encoder stay apart."""
    clip = small_encoder("Flux")
    edits = direction(clip), find_direction(clip, ["bench"], ["sofa"], "bench", "sofa")
    kind, _, layers = edits[1].encoder.partition("-")
    rounded = replace(edits[1], encoder=f"{kind}-0123456789abcdef-{layers.partition('-')[2]}")
    assert combine(edits[0], rounded, 1.0, 1.0).exchanges == combine(*edits, 1.0, 1.0).exchanges
    with pytest.raises(ValueError, match="direction_a and direction_b"):
        combine(edits[0], replace(rounded, encoder=f"Another{rounded.encoder}"), 1.0, 1.0)


def test_what_does_not_fit_is_refused_by_its_socket(tmp_path):
    clip = small_encoder("Flux")
    edit, conditioning = direction(clip), encoded(clip, CAPTION)
    with pytest.raises(ValueError, match="^clip: .*no fixed length"):
        Pix2PixZeroApplyDirection.execute(conditioning, edit, 1.0)
    with pytest.raises(ValueError, match="^caption: connect it together with clip"):
        Pix2PixZeroApplyDirection.execute(conditioning, edit, 1.0, clip)
    with pytest.raises(ValueError, match="^caption: 'cat' does not occur"):
        applied(clip, 1.0, caption="a photo of a bird")
    with pytest.raises(ValueError, match="^caption: the conditioning is not this text"):
        applied(clip, 1.0, caption="a cat")
    with pytest.raises(ValueError, match="^direction: it holds only the words"):
        save_direction(edit, "words")
