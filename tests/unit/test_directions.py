"""The arithmetic of edit directions against float64 sums written out here."""

import pytest
import torch
from pix2pix_zero.editing.directions import (
    EditDirection,
    aligned_direction,
    apply_direction,
    combine,
    edit_direction,
    same_encoder,
)
from pix2pix_zero.editing.token_alignment import Partners

TOKENS, WIDTH = 7, 5


def encodings(rows: int, seed: int, tokens: int = TOKENS, first_token: float = 2.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(rows, tokens, WIDTH, generator=generator)
    cond[:, 0] = first_token * torch.arange(1.0, WIDTH + 1)
    return {"cond": cond, "pooled_output": torch.randn(rows, 3, generator=generator)}


def direction(**changes) -> EditDirection:
    found = edit_direction([encodings(4, 1)], [encodings(4, 2)], encoder="clip", source="cat", target="dog")
    return EditDirection(**{**found.__dict__, **changes})


def test_a_direction_is_the_difference_of_the_means_of_every_output():
    source, target = [encodings(3, 1), encodings(5, 2)], [encodings(6, 3)]
    found = edit_direction(source, target, encoder="clip", source="cat", target="dog")
    for name in ("cond", "pooled_output"):
        a = torch.cat([e[name] for e in source]).double().numpy().mean(axis=0)
        b = torch.cat([e[name] for e in target]).double().numpy().mean(axis=0)
        assert found.tensors[name].shape == (1, *a.shape)
        assert found.tensors[name].dtype == torch.float32
        assert abs(found.tensors[name][0].double().numpy() - (b - a)).max() < 1e-6
    assert (found.encoder, found.source, found.target, found.count) == ("clip", "cat", "dog", 6)


def test_half_precision_encodings_are_averaged_without_loss():
    rows = {"cond": torch.full((4096, 2, 1), 1.0009765625).half()}
    zeros = {"cond": torch.zeros(1, 2, 1).half()}
    assert edit_direction([zeros], [rows]).tensors["cond"].flatten().tolist() == [1.0009765625] * 2


def test_the_size_of_batches_does_not_matter():
    rows = encodings(9, 4)
    split = [{k: v[i : i + 2] for k, v in rows.items()} for i in range(0, 9, 2)]
    a, b = edit_direction(split, [encodings(2, 5)]), edit_direction([rows], [encodings(2, 5)])
    assert torch.allclose(a.tensors["cond"], b.tensors["cond"], atol=1e-6)


def test_long_sentences_count_with_their_first_chunk():
    long = encodings(2, 6, tokens=2 * TOKENS)
    found = edit_direction([encodings(3, 7)], [encodings(1, 8), long], chunk_length=TOKENS)
    b = torch.cat([encodings(1, 8)["cond"], long["cond"][:, :TOKENS]]).double().mean(0)
    assert torch.allclose(found.tensors["cond"][0].double(), b - encodings(3, 7)["cond"].double().mean(0), atol=1e-6)


def test_a_direction_is_one_chunk_long_even_if_every_sentence_is_longer():
    source, target = encodings(2, 6, tokens=3 * TOKENS), encodings(2, 7, tokens=2 * TOKENS)
    found = edit_direction([source], [target], chunk_length=TOKENS)
    expected = (target["cond"][:, :TOKENS] - source["cond"][:, :TOKENS]).double().mean(0)
    assert torch.allclose(found.tensors["cond"][0].double(), expected, atol=1e-6)


def test_sentences_of_any_length_are_averaged_position_by_position():
    short, long = encodings(2, 6, tokens=4), encodings(3, 7, tokens=9)
    source = encodings(1, 8, tokens=6)
    found = edit_direction([source], [short, long])
    expected = [
        torch.cat([e["cond"][:, t].double() for e in (short, long) if t < e["cond"].shape[1]]).mean(0) for t in range(6)
    ]
    assert torch.allclose(found.tensors["cond"][0].double(), torch.stack(expected) - source["cond"][0], atol=1e-6)


def test_an_empty_side_is_refused():
    with pytest.raises(ValueError, match="^target: "):
        edit_direction([encodings(1, 1)], [])


# Of sentences with TOKENS rows: the target's row for each of the source's, and the words it adds.
PARTNERS = [
    ([0, 1, 4, 5, 6, 6, 6], [2, 3]),
    ([0, 3, 4, 5, 6, 6, 6], [1, 2]),
    ([0, 1, 2, 3, 4, 5, 6], []),
    ([0, 2, 3, -1, 5, 6, -1], [1]),
]


def numbered(encoded, *groups):
    """Batches of some rows each, as the host yields them: in any order."""
    return [(group, {name: rows[list(group)] for name, rows in encoded.items()}) for group in groups]


def aligned(source, target, pairs=PARTNERS):
    return aligned_direction(
        source, target, [Partners(torch.tensor(rows), tuple(added)) for rows, added in pairs], TOKENS
    )


def test_words_are_compared_with_themselves_and_what_the_target_adds_takes_the_place_of_padding():
    before, after = encodings(4, 1), encodings(4, 2, tokens=2 * TOKENS)
    found = aligned(numbered(before, (0, 1, 2, 3)), numbered(after, (2, 0), (3, 1)))
    a, b = before["cond"].double(), after["cond"].double()
    for p in range(TOKENS):
        differences, targets = [], []
        for i, (rows, _) in enumerate(PARTNERS):
            if rows[p] >= 0:
                differences.append(b[i, rows[p]] - a[i, p])
                targets.append(b[i, rows[p]])
        assert torch.allclose(found.tensors["cond"][0, p].double(), sum(differences) / len(differences), atol=1e-6)
        # The last two rows of the padding become the two words.
        word = p - (TOKENS - 2)
        if word >= 0:
            words = [b[i, added[word]] for i, (_, added) in enumerate(PARTNERS) if len(added) > word]
            expected = sum(words) / len(words) - sum(targets) / len(targets)
            assert torch.allclose(found.added[0, word].double(), expected, atol=1e-6)
    assert found.added.shape == (1, 2, WIDTH) and found.added.dtype == torch.float32
    pooled = (after["pooled_output"] - before["pooled_output"]).double().mean(0)
    assert torch.allclose(found.tensors["pooled_output"][0].double(), pooled, atol=1e-6)
    assert torch.equal(found.first_token, before["cond"][0, 0])


def test_words_that_few_sentences_add_are_left_out():
    before, after = (numbered(encodings(4, seed), (0, 1, 2, 3)) for seed in (1, 2))
    once = [PARTNERS[0], *[PARTNERS[2]] * 3]
    assert aligned(before, after, once).added is None
    assert aligned(before, after, [*once[:2], *once[:2]]).added.shape == (1, 2, WIDTH)


def test_where_no_word_shifts_words_and_positions_are_the_same_to_the_last_bit():
    before, after = (numbered(encodings(6, seed), (0, 1, 2, 3), (4, 5)) for seed in (1, 2))
    words = aligned(before, after, [PARTNERS[2]] * 6)
    positions = edit_direction([rows for _, rows in before], [rows for _, rows in after], TOKENS)
    assert all(torch.equal(words.tensors[name], positions.tensors[name]) for name in positions.tensors)
    assert words.added is None and words.count == positions.count


def test_the_same_sentences_have_no_direction():
    side = numbered(encodings(4, 1), (0, 1, 2, 3))
    found = aligned(side, side, [PARTNERS[2]] * 4)
    assert not any(tensor.any() for tensor in found.tensors.values()) and found.added is None


def test_added_words_go_to_the_last_rows_of_the_last_chunk():
    d, added = torch.randn(1, TOKENS, WIDTH), torch.randn(1, 2, WIDTH)
    cond, kept = torch.randn(3, 2 * TOKENS, WIDTH), d.clone()
    moved = apply_direction(cond, d, -0.5, added)
    plain = apply_direction(cond, d, -0.5)
    assert torch.equal(moved[:, :-2], plain[:, :-2])
    expected = cond[:, -2:].double() - 0.5 * (d[:, -2:].double() + added.double())
    assert torch.allclose(moved[:, -2:].double(), expected, atol=1e-6)
    assert torch.equal(d, kept), "a direction is applied to many captions"
    assert torch.equal(apply_direction(cond, d, 0.0, added), cond)


def test_combined_directions_keep_the_words_of_both_side_by_side():
    a, b = direction(added=torch.randn(1, 2, WIDTH)), direction(added=torch.randn(1, 1, WIDTH))
    both = combine(a, b, 0.5, -2.0)
    assert torch.equal(both.added, torch.cat([-2.0 * b.added, 0.5 * a.added], 1))
    assert torch.equal(combine(a, direction(), 0.5, 1.0).added, 0.5 * a.added)
    assert torch.equal(combine(direction(), b, 1.0, 3.0).added, 3.0 * b.added)
    assert combine(direction(), direction(), 1.0, 1.0).added is None


def test_it_is_added_to_every_row_and_every_chunk():
    d = torch.randn(1, TOKENS, WIDTH)
    cond = torch.randn(3, 2 * TOKENS, WIDTH)
    moved = apply_direction(cond, d, 1.5)
    for row in range(3):
        for token in range(2 * TOKENS):
            expected = cond[row, token].double() + 1.5 * d[0, token % TOKENS].double()
            assert torch.allclose(moved[row, token].double(), expected, atol=1e-6)
    pooled = apply_direction(torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0]]), -2.0)
    assert pooled.tolist() == [[-1.0, -3.0, -5.0]] * 2


def test_the_input_is_not_changed_and_keeps_its_dtype():
    cond = torch.randn(1, TOKENS, WIDTH).half()
    before = cond.clone()
    moved = apply_direction(cond, torch.ones(1, TOKENS, WIDTH), 1.0)
    assert moved.dtype == torch.float16 and torch.equal(cond, before) and not torch.equal(moved, cond)


def test_strength_zero_changes_no_bit():
    cond = torch.tensor([[[0.0, -0.0, 1e-42, float("inf"), 1.0]] * TOKENS])
    same = apply_direction(cond, torch.full((1, TOKENS, WIDTH), float("inf")), 0.0)
    assert torch.equal(same.view(torch.int32), cond.view(torch.int32))
    assert same.data_ptr() != cond.data_ptr()


@pytest.mark.parametrize("shape", [(1, TOKENS, WIDTH + 1), (1, TOKENS + 1, WIDTH), (1, WIDTH)])
def test_other_shapes_are_refused(shape):
    for strength in (0.0, 1.0):
        with pytest.raises(ValueError, match="^conditioning: .*text encoder"):
            apply_direction(torch.zeros(shape), torch.zeros(1, TOKENS, WIDTH), strength)


def test_combining_adds_the_weighted_tensors():
    a, b = direction(), direction(source="day", target="night")
    b.tensors["cond"] = torch.randn(1, TOKENS, WIDTH)
    both = combine(a, b, 0.5, -2.0)
    for name in ("cond", "pooled_output"):
        expected = 0.5 * a.tensors[name].double() - 2.0 * b.tensors[name].double()
        assert torch.allclose(both.tensors[name].double(), expected, atol=1e-6)
    assert both.encoder == "clip" and "cat" in both.source and "night" in both.target
    assert torch.equal(both.first_token, a.first_token)


def test_combining_directions_of_two_encoders_is_refused():
    other_width = direction(tensors={"cond": torch.zeros(1, TOKENS, WIDTH + 1)})
    no_pooled = direction(tensors={"cond": torch.zeros(1, TOKENS, WIDTH)})
    for other in (direction(encoder="another"), other_width, no_pooled):
        with pytest.raises(ValueError, match="direction_a and direction_b"):
            combine(direction(), other, 1.0, 1.0)


def test_the_start_token_tells_encoders_apart():
    d = direction()
    own, other = encodings(2, 9)["cond"], encodings(2, 9)["cond"]
    other[1, 0] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert same_encoder(own, d)
    assert same_encoder(own * 1.3, d), "prompt weighting may rescale an encoding"
    assert same_encoder(own.half(), d)
    assert same_encoder(torch.zeros_like(own), d)
    assert not same_encoder(other, d)


def test_an_encoder_without_a_constant_start_token_is_told_apart_by_shapes_only():
    rows = encodings(4, 1)
    rows["cond"][2, 0] += 3
    for source, target in (([rows], [encodings(4, 2)]), ([encodings(4, 1)], [encodings(4, 2, first_token=-2.0)])):
        found = edit_direction(source, target)
        assert found.first_token is None
        assert same_encoder(torch.randn(1, TOKENS, WIDTH), found)
