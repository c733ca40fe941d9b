"""Words of a caption exchanged for others, and the rows of its encoding that are compared."""

import pytest
import torch
from pix2pix_zero.editing.word_exchange import between, counterparts, differing_words, exchange_words


@pytest.mark.parametrize(
    ("caption", "source", "target", "expected"),
    [
        ("a cat on a bench", "cat", "dog", "a dog on a bench"),
        ("A cat and another cat.", "cat", "owl", "An owl and another owl."),
        ("three Cats", "cat", "dog", "three dogs"),
        ("a photo of an owl", "an owl", "a cat", "a photo of a cat"),
        ("a cat", "cat", "cat wearing glasses", "a cat wearing glasses"),
        ("a catalogue of a (cat:1.2)", "cat", "dog", "a catalogue of a (dog:1.2)"),
        ("a photo at day", "day", "night", "a photo at night"),
    ],
)
def test_exchanges_whole_words_with_article_and_plural(caption, source, target, expected):
    assert exchange_words(caption, source, target) == expected


def test_a_word_that_does_not_occur_is_refused():
    with pytest.raises(ValueError, match="^caption: 'cat' does not occur"):
        exchange_words("a catalogue", "cat", "dog")


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("a photo of a cat", "a photo of a dog", ("cat", "dog")),
        ("a cat sits", "a cat with a hat sits", ("cat", "cat with a hat")),
        ("a red cat sits", "a cat sits", ("a red", "a")),
        ("cat", "dog", ("cat", "dog")),
        ("cat", "orange cat", ("cat", "orange cat")),
    ],
)
def test_two_sentences_differ_in_some_words(source, target, expected):
    assert differing_words(source, target) == expected


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("abcde", "abXde", [0, 1, 2, 3, 4]),
        ("abcde", "abXYde", [0, 1, 2, 2, 3, 4]),
        ("abcde", "abcXde", [0, 1, 2, 2, 3, 4]),
        ("abcde", "abde", [0, 1, 3, 4]),
        ("abc", "Xabc", [0, 0, 1, 2]),
    ],
)
def test_tokens_stand_beside_themselves_or_what_is_in_their_place(source, target, expected):
    assert counterparts(source, target).tolist() == expected


def test_between_goes_from_the_counterparts_to_the_target():
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(2, tokens, 3, generator=generator) for tokens in (4, 5))
    rows = torch.tensor([0, 1, 1, 2, 3])
    assert torch.equal(between(source, target, rows, 1.0), target)
    torch.testing.assert_close(between(source, target, rows, 0.0), source[:, rows])
    torch.testing.assert_close(between(source, target, rows, 0.25), 0.75 * source[:, rows] + 0.25 * target)
