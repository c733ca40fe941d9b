"""Edit directions by words: each word of the caption moves to itself."""

from dataclasses import replace

import pytest
import torch
from pix2pix_zero.editing.sentences import paired_sentences
from pix2pix_zero.nodes import directions as nodes
from tiny_clip import encode, tiny_clip

CAPTION = "a photo of an orange cat in summer"


@pytest.fixture(params=["sd1", "sdxl"])
def clip(request):
    with torch.inference_mode():
        return tiny_clip(request.param)


def rows_of(clip, text):
    """[tokens, width] as the stock node encodes it, in double precision."""
    return encode(clip, text)[0][0][0].double()


def test_a_direction_by_words_moves_each_word_to_itself_and_adds_what_is_new(clip, run_node):
    """One pair, so that no mean is taken. Every word here is one token, so word i is row i + 1."""
    lines = {"source_sentences": "a cat in winter", "target_sentences": "a cat with glasses in winter"}
    node = nodes.Pix2PixZeroEditDirectionFromSentences
    (found,) = run_node(node, clip=clip, alignment="words", **lines)
    source, target = (rows_of(clip, text) for text in lines.values())
    rows = [
        0,
        1,
        2,
        5,
        6,
        7,
        8,
        8,
        *range(8, 77),
    ]  # start, a, cat, in, winter, end, two rows before the longer's padding
    shift = target[rows] - source
    assert torch.allclose(found.tensors["cond"][0].double(), shift, atol=1e-5)
    (moved,) = run_node(nodes.Pix2PixZeroApplyDirection, conditioning=encode(clip, "a cat in winter"), direction=found)
    expected = torch.cat([target[rows[:-2]], target[3:5]])
    assert torch.allclose(moved[0][0][0].double(), expected, atol=1e-5)
    assert torch.allclose(moved[0][1]["pooled_output"], encode(clip, lines["target_sentences"])[0][1]["pooled_output"])


def test_by_words_it_is_the_mean_over_sentences_in_any_order(clip, run_node):
    """Long and weighted sentences are encoded out of their order, and words count where half of the sentences add them."""
    long = ", ".join(["a small red cat on a long red carpet"] * 12)
    sources = ["a cat at night", long, "a (big:1.3) cat", "a cat"]
    targets = ["a cat with glasses at night", f"{long} with glasses", "a (big:1.3) cat with glasses", "a dog"]
    lines = {"source_sentences": "\n".join(sources), "target_sentences": "\n".join(targets)}
    (found,) = run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=clip, alignment="words", **lines)
    padding = [*range(6, 77)]
    rows = [
        [0, 1, 2, 5, 6, 7, *(max(p, 8) for p in padding)],
        [*range(77)],  # the first chunk of the long sentence is full and all alike
        [0, 1, 2, 3, 6, *(max(p, 7) for p in (5, *padding))],
        [*range(77)],
    ]
    a, b = ([rows_of(clip, text)[:77] for text in side] for side in (sources, targets))
    shifts = [after[places] - before for before, after, places in zip(a, b, rows)]
    assert torch.allclose(found.tensors["cond"][0].double(), sum(shifts) / 4, atol=1e-5)
    words = (b[0][3:5] + b[2][4:6]) / 2 - sum(after[places] for after, places in zip(b, rows))[-2:] / 4
    assert torch.allclose(found.added[0].double(), words, atol=1e-5)


def test_by_words_a_long_caption_gets_what_is_added_in_its_last_chunk(clip, run_node):
    lines = {
        "source_sentences": "a cat\na dog at night",
        "target_sentences": "a cat with glasses\na dog with glasses at night",
    }
    (found,) = run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=clip, alignment="words", **lines)
    assert found.added.shape[1] == 2
    plain = replace(found, added=None)
    for caption, chunks in ((CAPTION, 1), (", ".join([CAPTION] * 12), 2), ("a (cat:1.2), a ((dog))", 1), ("", 1)):
        cond = encode(clip, caption)
        assert cond[0][0].shape[1] == 77 * chunks
        moved, without = (
            run_node(nodes.Pix2PixZeroApplyDirection, conditioning=cond, direction=d, strength=0.7)[0][0]
            for d in (found, plain)
        )
        added = moved[0].double() - without[0].double()
        assert not added[:, :-2].any()
        assert torch.allclose(added[:, -2:], 0.7 * found.added.double(), atol=1e-5)
        assert torch.equal(moved[1]["pooled_output"], without[1]["pooled_output"])


def test_without_shifts_words_and_positions_are_the_same_bits(clip, run_node):
    source, target = paired_sentences("cat", "dog", 40, 0)
    lines = {"source_sentences": "\n".join(source), "target_sentences": "\n".join(target)}
    found = [
        run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=clip, **lines, **chosen)[0]
        for chosen in ({}, {"alignment": "positions"}, {"alignment": "words"})
    ]
    for other in found[1:]:
        assert all(torch.equal(other.tensors[k], found[0].tensors[k]) for k in found[0].tensors)
        assert other.added is None


def test_sentences_that_have_no_partner_cannot_be_aligned(clip, run_node):
    node = nodes.Pix2PixZeroEditDirectionFromSentences
    lines = {"source_sentences": "a cat\na black cat", "target_sentences": "a dog"}
    with pytest.raises(ValueError, match="^alignment: .*2 source_sentences and 1 target_sentences.*positions"):
        run_node(node, clip=clip, alignment="words", **lines)
    run_node(node, clip=clip, **lines)
