"""The paired template grammar and the sentence banks."""

import re
from collections import Counter

import pix2pix_zero.editing.sentences as sentence_module
import pytest
from pix2pix_zero.editing.sentences import (
    bank_names,
    concept_sentences,
    indefinite,
    natural_pairs,
    paired_sentences,
    read_sentence_lists,
    sentence_bank,
    sentences,
)

PAIRS = [
    ("cat", "dog"),
    ("horse", "zebra"),
    ("cat", "cat wearing glasses"),
    ("summer", "winter"),
    ("day", "night"),
    ("photo", "pencil sketch"),
    ("photograph", "oil pastel"),
    ("wooden", "metal"),
    ("man", "woman"),
    ("orange cat", "black cat"),
    ("chair", "golden chair"),
    ("without glasses", "glasses"),
    ("dog", "night"),
    ("cat", "oil painting"),
    ("Hund", "Katze"),
    ("\u732b", "\u72ac"),
    ("axolotl", "unicorn"),
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_two_sides_differ_in_nothing_but_the_concept(source, target):
    for a, b in zip(*paired_sentences(source, target, 200, seed=0), strict=True):
        words_a, words_b = Counter(a.split()), Counter(b.split())
        changed = set((words_a - words_b) + (words_b - words_a)) - {"a", "an"}
        allowed = set(f"{source} {target} wearing during the at in of drawing".split())
        assert changed and changed <= allowed, (a, b)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_sentences_are_distinct_and_the_same_for_the_same_seed(source, target):
    first = paired_sentences(source, target, 250, seed=7)
    assert first == paired_sentences(source, target, 250, seed=7)
    assert first != paired_sentences(source, target, 250, seed=8)
    assert [len(set(side)) for side in first] == [250, 250]


def test_natural_pairs_are_the_sentences_of_both_banks_with_the_concept_exchanged():
    pairs = list(zip(*natural_pairs("cat", "elephant", 256, seed=0), strict=True))
    banks = {"cat": set(sentence_bank("cat")), "elephant": set(sentence_bank("elephant"))}
    sources = sum(a in banks["cat"] for a, _ in pairs)
    targets = sum(b in banks["elephant"] for _, b in pairs)
    assert sources > 80 and targets > 80 and sources + targets >= 256
    for a, b in pairs:
        # what the article stands before is all that differs
        assert re.sub(r"\b(an?\s+)?cat\b", "_", a, flags=re.I) == re.sub(r"\b(an?\s+)?elephant\b", "_", b, flags=re.I)
        assert not re.search(r"\ban cat\b|\ba elephant\b|\belephant\b.*\bcat\b", a + b, re.I), (a, b)
        assert a[0].isupper() == b[0].isupper()
    assert len(set(pairs)) == len(pairs) == 256
    assert natural_pairs("cat", "elephant", 256, seed=0) == natural_pairs("cat", "elephant", 256, seed=0)


def test_a_bank_serves_an_edit_that_adds_something_to_its_concept():
    source, target = natural_pairs("cat", "cat wearing glasses", 100, seed=0)
    assert sum(sentence in sentence_bank("cat") for sentence in source) == 100
    assert [sentence.replace("cat wearing glasses", "cat") for sentence in target] == source


def test_without_a_bank_the_pairs_are_those_of_the_grammar():
    assert natural_pairs("axolotl", "unicorn", 50, seed=3) == paired_sentences("axolotl", "unicorn", 50, seed=3)


@pytest.mark.parametrize(("source", "target"), [("day", "night"), ("photo", "pencil sketch"), ("wooden", "metal")])
def test_concepts_that_want_other_words_around_them_are_left_to_the_grammar(source, target):
    assert natural_pairs(source, target, 50, seed=3) == paired_sentences(source, target, 50, seed=3)


def test_where_the_banks_have_too_few_the_grammar_fills_up():
    pairs = list(zip(*natural_pairs("cat", "dog", 1000, seed=0), strict=True))
    grammar = set(zip(*paired_sentences("cat", "dog", 1000, seed=0)))
    assert len(pairs) == len(set(pairs)) == 1000
    assert 300 < sum(pair in grammar for pair in pairs) < 700


def test_a_thousand_pairs_of_animals_are_distinct():
    for side in paired_sentences("cat", "dog", 1000, seed=0):
        assert len(set(side)) == 1000


def test_words_of_a_swap_stand_where_the_caption_has_them():
    source, target = paired_sentences("cat", "dog", 256, seed=0)
    positions = Counter(sentence.split().index("cat") for sentence in source)
    assert all(a.split().index("cat") == b.split().index("dog") for a, b in zip(source, target, strict=True))
    # "a cat", "an orange cat", "a photo of a cat", "a photo of an orange cat"
    assert sum(positions[i] for i in (1, 2, 4, 5)) > 0.8 * 256
    assert "a photo of an orange cat in summer during the day" in sentences("cat", 1000, seed=0)


def test_an_addition_keeps_the_words_before_it():
    for a, b in zip(*paired_sentences("dog", "dog wearing a red hat", 100, seed=0), strict=True):
        assert b == f"{a} wearing a red hat"


@pytest.mark.parametrize(
    ("concept", "expected"),
    [
        ("winter", r"in winter\b"),
        ("night", r"at night\b"),
        ("during the day", r"during the day\b"),
        ("rainy day", r"on a rainy day\b"),
        (
            "glasses",
            r"\b(cat|dog|rabbit|horse|zebra|cow|sheep|bird|lion|man|woman|boy|girl|child|person)\b.* wearing glasses$",
        ),
        ("hat", r"wearing a hat$"),
        ("wooden", r"a wooden \w+"),
        ("oil painting", r"^an oil painting of (a|an) "),
        ("van gogh painting", r"^a van gogh painting of (a|an) "),
        ("in the style of Monet", r" in the style of Monet$"),
        ("a unicorn", r"\ba (\w+ )?unicorn\b|\ban \w+ unicorn\b"),
        ("trees", r"(?<!\ba )(?<!\ban )\btrees\b"),
        ("snow", r"in the snow\b"),
    ],
)
def test_each_kind_of_concept_gets_sentences_of_its_kind(concept, expected):
    for sentence in sentences(concept, 60, seed=1):
        assert re.search(expected, sentence), sentence


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("cat", "a cat"),
        ("orange cat", "an orange cat"),
        ("hour", "an hour"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("used car", "a used car"),
        ("one-eyed dog", "a one-eyed dog"),
        ("European city", "a European city"),
        ("MRI", "an MRI"),
        ("UFO", "a UFO"),
        ("glass", "a glass"),
        ("glasses", "glasses"),
        ("bus", "a bus"),
        ("zebras", "zebras"),
        ("people", "people"),
        ("water", "water"),
        ("glass of water", "a glass of water"),
        ("the moon", "the moon"),
        ("\u00e9clair", "an \u00e9clair"),
        ("\u732b", "\u732b"),
        ("50 cent coin", "a 50 cent coin"),
        ("8-bit game", "an 8-bit game"),
    ],
)
def test_articles(phrase, expected):
    assert indefinite(phrase) == expected


def test_no_sentence_has_a_wrong_article():
    for concept in ("cat", "unicorn", "hour glass", "oil painting", "old", "winter", "glasses", "ice"):
        for sentence in sentences(concept, 300, seed=2):
            assert not re.search(r"\ba [aeio]|\ban (?!hour)[^aeiou]|\ban unicorn|  |^ | $", sentence), sentence


@pytest.mark.parametrize("empty", ["", "   ", "\n", " . ", '""'])
def test_an_empty_concept_is_refused_by_the_socket_it_came_from(empty):
    with pytest.raises(ValueError, match="^source: "):
        paired_sentences(empty, "dog", 10, 0)
    with pytest.raises(ValueError, match="^target: "):
        paired_sentences("cat", empty, 10, 0)
    with pytest.raises(ValueError, match="^concept: "):
        concept_sentences(empty, 10, 0)


@pytest.mark.parametrize(
    ("source", "target"), [("cat", "cat"), ("cat", " A Cat. "), ("night", "at night"), ("wood", "wooden")]
)
def test_the_same_concept_on_both_sides_is_refused(source, target):
    with pytest.raises(ValueError, match="^target: "):
        paired_sentences(source, target, 10, 0)


def test_sentence_lists_are_read_line_by_line():
    source, target = read_sentence_lists(
        '1. a cat\n\n- "a black cat"\n  a cat asleep  ', "* a dog\r\n2) a dog, 3 years old\n"
    )
    assert source == ["a cat", "a black cat", "a cat asleep"]
    assert target == ["a dog", "a dog, 3 years old"]


@pytest.mark.parametrize(
    ("source", "target", "socket"),
    [
        ("", "a dog", "source_sentences"),
        ("a cat", " \n ", "target_sentences"),
        ("a cat", "A cat", "target_sentences"),
        ("a cat\na dog", "a dog\n\na cat", "target_sentences"),
    ],
)
def test_empty_or_equal_sentence_lists_are_refused(source, target, socket):
    with pytest.raises(ValueError, match=f"^{socket}: "):
        read_sentence_lists(source, target)


def test_there_are_banks_for_all_kinds_of_concepts():
    assert len(bank_names()) >= 24
    for concept in ("cat", "car", "wooden", "winter", "night", "pencil sketch", "oil pastel", "glasses"):
        assert sentence_bank(concept)
    assert sentence_bank("Photo") == sentence_bank("photograph")
    assert sentence_bank("axolotl") is None


@pytest.mark.parametrize("concept", sorted(bank_names()))
def test_a_bank_holds_many_distinct_clean_sentences_about_its_concept(concept):
    bank = sentence_bank(concept)
    assert len(bank) >= 250
    assert len({s.casefold().rstrip(".!") for s in bank}) == len(bank)
    openings = Counter(" ".join(s.split()[:3]).casefold() for s in bank)
    assert openings.most_common(1)[0][1] < 0.35 * len(bank)
    for s in bank:
        assert concept.removesuffix("f") in s.casefold(), s
        assert 10 <= len(s) <= 150 and s == s.strip() and s.isascii() and "  " not in s, s
        assert not re.search(r"\ba [aeio]\w|\ban [^aeiouAEIOUh]|\b(\w+) \1\b|[{}\d@]", s), s


def test_a_bank_is_used_first_and_topped_up_by_the_grammar():
    bank = set(sentence_bank("cat"))
    assert set(concept_sentences("cat", 100, seed=0)) < bank
    many = concept_sentences("cat", 700, seed=0)
    assert len(many) == len(set(many)) == 700
    assert bank < set(many)
    assert many == concept_sentences("cat", 700, seed=0)
    assert len(set(concept_sentences("axolotl", 256, seed=0))) == 256


def test_the_grammar_does_not_repeat_what_the_bank_says(monkeypatch):
    monkeypatch.setattr(sentence_module, "sentence_bank", lambda concept: sentences(concept, 100, seed=0))
    many = concept_sentences("axolotl", 300, seed=0)
    assert len(many) == len(set(many)) == 300
