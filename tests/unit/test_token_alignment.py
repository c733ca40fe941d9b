"""Token maps between two prompts, against brute force and the formulas of Prompt-to-Prompt written out in loops."""

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
import torch
from pix2pix_zero.editing.token_alignment import align, column_factors, map_tokens, partner_rows, read_prompt
from pix2pix_zero.editing.word_masks import WordMask, soft_mask

LENGTH = 14


def prompt(*chunks, length=LENGTH):
    """Chunks of words in the layout of CLIP; a word's tokens are joined by hyphens."""
    rows = []
    for text in chunks:
        tokens = [part for word in text.split() for part in f"{word}.".replace("-", "- ").split()]
        row = [("<start>", 0), *((token, 1) for token in tokens), ("<end>", 0)]
        rows.append(row + [("<pad>", 0)] * (length - len(row)))
    return read_prompt(rows, lambda token: token.replace(".", "</w>").strip("-"))


def all_alignments(m, n):
    """Every way to pair items of two sequences in order, as lists of index pairs."""
    for size in range(min(m, n) + 1):
        for left in combinations(range(m), size):
            for right in combinations(range(n), size):
                yield list(zip(left, right))


def random_sequences(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        m, n = torch.randint(0, 6, (2,), generator=generator).tolist()
        yield [torch.randint(0, 3, (size,), generator=generator).tolist() for size in (m, n)]


def test_alignment_is_the_best_of_all():
    for source, target in random_sequences(80):

        def likeness(i, j):
            return (2 * source[i] + target[j]) % 3

        def merit(pairs):
            likes = [likeness(i, j) for i, j in pairs if source[i] != target[j]]
            return len(pairs) - len(likes), likes.count(2), likes.count(2) + likes.count(1), len(pairs)

        table = np.array([[likeness(i, j) for j in range(len(target))] for i in range(len(source))], int)
        table = table.reshape(len(source), len(target))
        pairs = align(source, target, lambda i, table=table: table[i])
        paired = [pair for pair in pairs if None not in pair]
        assert merit(paired) == max(merit(pairs) for pairs in all_alignments(len(source), len(target)))
        assert [i for i, _ in pairs if i is not None] == list(range(len(source)))
        assert [j for _, j in pairs if j is not None] == list(range(len(target)))


def test_two_thousand_words_are_aligned_in_little_memory_and_time():
    """Every other word has changed; a whole table takes 32 MB, one of Python's tuples a gigabyte."""
    source = [f"word {i}" for i in range(2000)]
    target = [word if i % 2 else f"other {i}" for i, word in enumerate(source)]
    tracemalloc.start()
    pairs = align(source, target)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pairs == [(i, i) for i in range(2000)]
    assert peak < 4e6


def test_of_equally_good_alignments_the_earliest_is_taken():
    assert align("ab", "acdb") == [(0, 0), (None, 1), (None, 2), (1, 3)]
    assert align("axb", "acdb") == [(0, 0), (1, 1), (None, 2), (2, 3)]


@pytest.mark.parametrize(
    ("source", "target", "pairs"),
    [
        ("a cat at night", "a dog wearing glasses at night", "a:a cat:dog at:at night:night"),
        ("a cat", "a fluffy dog", "a:a cat:dog"),
        ("a house during the day", "a house at night", "a:a house:house during:at day:night"),
        ("a white cat", "a dog", "a:a cat:dog"),
        ("two cats on a sofa", "three dogs near the sea", "two:three cats:dogs on:near a:the sofa:sea"),
        ("a cat , a dog", "a cat and a dog", "a:a cat:cat ,:and a:a dog:dog"),
    ],
)
def test_words_take_over_from_words_of_their_kind(source, target, pairs):
    before, after = prompt(source), prompt(target)
    mapper = map_tokens(before, after).mapper
    found = [f"{a.text}:{b.text}" for a in before.words for b in after.words if mapper[a.positions[0], b.positions[0]]]
    assert found == pairs.split()


def test_words_are_grouped_from_tokens_and_counted_over_chunks():
    read = prompt("a gold-fish-bowl", "red", length=7)
    assert [word.tokens for word in read.words] == [("a.",), ("gold-", "fish-", "bowl."), ("red.",)]
    assert [word.positions for word in read.words] == [(1,), (2, 3, 4), (8,)]
    assert [word.text for word in read.words] == ["a", "goldfishbowl", "red"]
    assert read.length == 14


def test_a_word_may_go_on_in_the_next_chunk_but_not_past_its_segment():
    rows = [[("s", 0), ("x-", 1), ("e", 0)], [("s", 0), ("y.", 1), ("z-", 1), ("w.", 2), ("e", 0)]]
    words = read_prompt(rows, lambda token: token.replace(".", "</w>")).words
    assert [word.positions for word in words] == [(1, 4), (5,), (6,)]


def test_phrases_are_found_word_by_word():
    read = prompt("a cat and a catfish and cat and a")
    (phrase,) = (prompt("and a").words,)
    assert [word.positions[0] for word in read.find(phrase)] == [3, 4, 8, 9]
    assert read.find(prompt("fish").words) == []
    assert read.find(()) == []


def maps_pair(source, target, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(2, 3, 5, p.length, generator=generator).softmax(-1) for p in (source, target))


def test_equal_prompts_pass_every_map_on():
    text = prompt("a gold-fish in a bowl")
    found = map_tokens(text, text)
    source, own = maps_pair(text, text)
    assert torch.equal(found.edit(source, own), source)
    assert found.removed == found.added == ()


def test_replacement_passes_a_words_map_on_to_as_many_tokens():
    before, after = prompt("a cat on the gold-fish"), prompt("a tiger on the rhi-no")
    source, own = maps_pair(before, after)
    found = map_tokens(before, after)
    assert torch.equal(found.edit(source, own), source)
    assert [word.tokens for word in found.removed] == [("cat.",), ("gold-", "fish.")]
    assert [word.tokens for word in found.added] == [("tiger.",), ("rhi-", "no.")]


def test_replacement_shares_a_words_map_among_another_number_of_tokens():
    """The paper's soft replacement, as its authors' mapper has it: each new token gets 1/n of the old word's attention."""
    before, after = prompt("a rhi-no sits"), prompt("a hip-po-pot sits")
    source, own = maps_pair(before, after)
    edited = map_tokens(before, after).edit(source, own)
    whole = source[..., 2] + source[..., 3]
    for token in (2, 3, 4):
        torch.testing.assert_close(edited[..., token], whole / 3)
    for old, new in {0: 0, 1: 1, 4: 5, 5: 6}.items():  # start, "a", "sits", end
        assert torch.equal(edited[..., new], source[..., old])
    assert torch.equal(edited[..., 7:], source[..., 7:])  # padding that both have in this place


def test_refinement_gathers_kept_words_and_leaves_new_ones_their_own_maps():
    """M*[j] = M_source[A(j)] where the alignment A has a partner, else the edit's own map (section 3.2)."""
    before, after = prompt("a cat sits"), prompt("a fluffy cat with gla-sses sits")
    source, own = maps_pair(before, after)
    edited = map_tokens(before, after).edit(source, own)
    partner = {0: 0, 1: 1, 3: 2, 7: 3, 8: 4, **{i: i for i in range(9, LENGTH)}}
    for token in range(LENGTH):
        expected = source[..., partner[token]] if token in partner else own[..., token]
        assert torch.equal(edited[..., token], expected), token


def test_removed_words_pass_nothing_on():
    before, after = prompt("a fluffy cat sits"), prompt("a cat sits")
    found = map_tokens(before, after)
    assert not found.mapper[2].any()
    assert [word.tokens for word in found.removed] == [("fluffy.",)]
    source, own = maps_pair(before, after)
    assert torch.equal(found.edit(source, own)[..., 5], own[..., 5])  # padding where the source still has its end


@pytest.mark.parametrize("shorter_first", [True, False])
def test_the_attention_around_the_words_is_kept_when_the_number_of_chunks_changes(shorter_first):
    short, long = prompt("a cat sits"), prompt("a cat sits", "quietly")
    before, after = (short, long) if shorter_first else (long, short)
    found = map_tokens(before, after)
    starts = [chunk.start[0] for chunk in before.chunks]
    assert torch.equal(found.mapper[starts].sum(1), torch.ones(len(starts)))
    columns = [chunk.start[0] for chunk in after.chunks]
    assert found.mapper[:, columns].sum() == len(starts)


def test_reweighting_multiplies_the_columns_of_the_named_words():
    text = prompt("a gold-fish in a bowl")
    factors = column_factors(
        text.length, [(text.find(prompt("gold-fish").words), 2.0), (text.find(prompt("a").words), 0)]
    )
    assert factors.tolist() == [1, 0, 2, 2, 1, 0] + [1] * (LENGTH - 6)


def test_word_mask_is_the_grown_and_thresholded_sum_of_the_words_maps():
    generator = torch.Generator().manual_seed(0)
    mask = WordMask([1, 4], (6, 5))
    layers = [torch.rand(2, 3, 30, 7, generator=generator) ** 8 for _ in range(4)]
    for maps in layers:
        mask.add(maps)
    area = mask.area(0.6)
    for row in range(2):
        total = sum(maps[row, head, :, t] for maps in layers for head in range(3) for t in (1, 4)).view(6, 5)
        grown = torch.empty(6, 5)
        for y in range(6):
            for x in range(5):
                grown[y, x] = total[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max()
        assert torch.equal(area[row, 0], (grown - grown.min()) / (grown.max() - grown.min()) > 0.6)
    assert area.any() and not area.all()


def test_soft_mask_is_the_union_with_soft_edges():
    one = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    other = one.clone()
    one[..., :1], other[..., 3:] = True, True
    mask = soft_mask([one, other], (16, 16))
    assert mask.shape == (1, 1, 16, 16)
    assert mask[..., 0].eq(1).all() and mask[..., -1].eq(1).all() and mask[..., 7:9].eq(0).all()
    assert mask[..., 3].gt(0).all() and mask[..., 3].lt(1).all()


# The target's row for each row of the source; start, words, end and padding of LENGTH tokens.
ROWS = {
    "nothing shifts": ("a cat at night", "a dog at night", [*range(14)], []),
    "added inside": (
        "a cat at night",
        "a cat wearing glasses at night",
        [0, 1, 2, 5, 6, 7, 8, 8, 8, 9, 10, 11, 12, 13],
        [3, 4],
    ),
    "added at the end": ("a cat", "a cat with glasses", [0, 1, 2, 5, 6, 6, 6, 7, 8, 9, 10, 11, 12, 13], [3, 4]),
    "removed": ("a cat with glasses", "a cat", [0, 1, 2, 13, 13, 3, 6, 7, 8, 9, 10, 11, 12, 13], []),
    "one for two": ("a cat at", "a gold-fish at", [0, 1, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 13], [2]),
    "two for one": ("a gold-fish at", "a cat at", [0, 1, 13, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13], []),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_two_sentences_are_partners_word_by_word(case):
    source, target, rows, added = ROWS[case]
    found = partner_rows(prompt(source), prompt(target), LENGTH)
    assert found.rows.tolist() == rows
    assert list(found.added) == added


def test_rows_that_leave_the_first_chunk_have_no_partner():
    source, target = prompt("a b c d", "e", length=6), prompt("x a b c", "d e", length=6)
    found = partner_rows(source, target, 6)
    assert found.rows.tolist() == [0, 2, 3, 4, -1, 5], "d has left the chunk"
    assert found.added == (1,)
    assert partner_rows(target, source, 6).rows.tolist() == [0, -1, 1, 2, 3, 5], "no padding for what was removed"
