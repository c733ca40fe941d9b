"""Lists of texts and batches of pictures."""

import pytest
import torch
from pix2pix_zero.host.batching import TEXT_LENGTHS, run_per_picture, stack_conditionings


def text(value, tokens=4, width=3, pooled=None):
    extras = {} if pooled is None else {"pooled_output": torch.full((1, 2), float(pooled))}
    return [[torch.full((1, tokens, width), float(value)), extras]]


def record(**inputs):
    return (inputs,)


def test_one_text_per_picture_becomes_one_run_with_a_row_each():
    ((call,),) = run_per_picture(record, {"text": [text(1, pooled=5), text(2, pooled=6)], "cfg": [3]}, [2], ("text",))
    ((rows, extras),) = call["text"]
    assert rows[:, 0, 0].tolist() == [1, 2]
    assert extras["pooled_output"][:, 0].tolist() == [5, 6]
    assert call["cfg"] == 3


def test_several_texts_for_one_picture_are_one_run_each():
    (calls,) = run_per_picture(record, {"text": [text(1), text(2), text(3)], "cfg": [3, 4]}, [1], ("text",))
    assert [call["text"][0][0][0, 0, 0].item() for call in calls] == [1, 2, 3]
    assert [call["cfg"] for call in calls] == [3, 4, 4]  # the host repeats the last item of a shorter list


def test_a_list_of_pictures_keeps_its_texts_apart():
    (calls,) = run_per_picture(record, {"text": [text(1), text(2)], "picture": ["a", "b"]}, [1, 1], ("text",))
    assert [(call["picture"], call["text"][0][0][0, 0, 0].item()) for call in calls] == [("a", 1), ("b", 2)]


def test_texts_of_unequal_length_are_repeated_so_that_attention_does_not_change():
    torch.manual_seed(0)
    short, long = torch.randn(1, 2, 3), torch.randn(1, 3, 3)
    ((rows, options),) = stack_conditionings([[[short, {}]], [[long, {}]]], "positive")
    assert rows.shape == (2, 6, 3)
    assert options[TEXT_LENGTHS] == (2, 3)
    query = torch.randn(1, 5, 3)
    for row, alone in zip(rows, (short, long)):
        repeated, expected = (
            torch.nn.functional.scaled_dot_product_attention(query, keys, keys) for keys in (row[None], alone)
        )
        assert torch.allclose(repeated, expected, atol=1e-6)


def test_texts_of_other_encoders_or_parts_are_refused():
    with pytest.raises(ValueError, match="positive.*encoders"):
        stack_conditionings([text(1), text(1, width=5)], "positive")
    with pytest.raises(ValueError, match="negative.*combined alike"):
        stack_conditionings([text(1), text(1) + text(2)], "negative")
