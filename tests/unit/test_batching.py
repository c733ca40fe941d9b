"""Lists of texts and batches of pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfy_api.latest import io
from pix2pix_zero.host.running import entered, per_picture
from pix2pix_zero.host.text.conditionings import TEXT_LENGTHS, stack_conditionings


def text(value, tokens=4, width=3, pooled=None):
    extras = {} if pooled is None else {"pooled_output": torch.full((1, 2), float(pooled))}
    return [[torch.full((1, tokens, width), float(value)), extras]]


@pytest.fixture
def calls():
    return []


@pytest.fixture
def node(calls):
    """The `execute` of a node that writes down what it is called with."""

    class Node:
        @classmethod
        def GET_SCHEMA(cls):  # noqa: N802 (the host's name)
            return io.Schema(node_id="Node", inputs=[], is_input_list=True)

        @classmethod
        @per_picture("picture", ("text",), ("mask",))
        def execute(cls, **inputs):
            calls.append(inputs)
            return io.NodeOutput(len(calls))

    return entered(Node, {}).execute


def picture(pictures=1):
    return {"samples": torch.zeros(pictures, 4, 8, 8)}


def values(call):
    return call["text"][0][0][:, 0, 0].tolist()


def test_one_text_per_picture_becomes_one_run_with_a_row_each(node, calls):
    node(picture=[picture(2)], text=[text(1, pooled=5), text(2, pooled=6)], cfg=[3])
    ((_, extras),) = calls[0]["text"]
    assert [values(call) for call in calls] == [[1, 2]]
    assert extras["pooled_output"][:, 0].tolist() == [5, 6]
    assert calls[0]["cfg"] == 3


def test_several_texts_for_one_picture_are_one_run_each(node, calls):
    outputs = node(picture=[picture()], text=[text(1), text(2), text(3)], cfg=[3, 4])
    assert outputs.result == ([1, 2, 3],)
    assert [values(call) for call in calls] == [[1], [2], [3]]
    assert [call["cfg"] for call in calls] == [3, 4, 4]  # the host repeats the last item of a shorter list


@pytest.mark.parametrize(
    ("batches", "texts", "expected"),
    [
        ([1, 1], [1, 2], [[1], [2]]),
        ([2, 2], [1, 2, 3, 4], [[1, 2], [3, 4]]),
        ([2, 1], [1, 2, 3], [[1, 2], [3]]),
        ([2, 2], [1, 2], [[1], [2]]),  # one for each batch
        ([2, 1], [1], [[1], [1]]),
    ],
)
def test_the_texts_of_a_list_of_batches_go_to_their_pictures(node, calls, batches, texts, expected):
    node(picture=[picture(size) for size in batches], text=[text(value) for value in texts])
    assert [values(call) for call in calls] == expected


@pytest.mark.parametrize(("batches", "texts"), [([2], 3), ([3], 2), ([2, 2], 3), ([1, 1], 3), ([2, 1], 4)])
def test_texts_that_fit_no_picture_are_refused_with_both_numbers(node, batches, texts):
    with pytest.raises(ValueError, match=f"text: it brings {texts} texts for {sum(batches)} pictures"):
        node(picture=[picture(size) for size in batches], text=[text(value) for value in range(texts)])


def masks(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None, None].expand(-1, 8, 8)


@pytest.mark.parametrize(
    ("batches", "given", "expected"),
    [
        ([2], [masks(1), masks(2)], [[1, 2]]),  # from a list of pictures that were made a batch
        ([2], [masks(1, 2)], [[1, 2]]),
        ([2], [masks(1)], [[1]]),
        ([2, 1], [masks(1, 2, 3)], [[1, 2], [3]]),
        ([1, 1], [masks(1, 2)], [[1], [2]]),
        ([2, 1], [masks(1), masks(2), masks(3)], [[1, 2], [3]]),
        ([2, 1], [masks(1, 2), masks(3)], [[1, 2], [3]]),
        ([2, 2], [masks(1)], [[1], [1]]),
        ([1], [masks(1), masks(2)], [[1], [2]]),  # one picture, edited twice
    ],
)
def test_masks_go_to_their_pictures_as_texts_do(node, calls, batches, given, expected):
    node(picture=[picture(size) for size in batches], text=[text(1)], mask=given)
    assert [call["mask"][:, 0, 0].tolist() for call in calls] == expected


def test_masks_that_fit_no_picture_are_refused(node):
    with pytest.raises(ValueError, match="mask: it brings 3 batches of them for 4 pictures in 2 batches"):
        node(picture=[picture(2), picture(2)], text=[text(1)], mask=[masks(1), masks(2), masks(3)])
    with pytest.raises(ValueError, match="mask: those of one batch must be of one size"):
        node(picture=[picture(2)], text=[text(1)], mask=[masks(1), torch.ones(1, 9, 9)])


def test_an_empty_list_is_named(node):
    with pytest.raises(ValueError, match="cfg: the list is empty"):
        node(picture=[picture()], text=[text(1)], cfg=[])


@pytest.mark.parametrize(
    "limits",
    [
        ({"mask": torch.zeros(1, 8, 8)}, {"mask": torch.ones(1, 8, 8)}),
        ({"area": (4, 4, 0, 0)}, {"area": (4, 4, 0, 4)}),
        ({"start_percent": 0.0}, {"start_percent": 0.5}),
        ({"control": object()}, {"control": object()}),
        ({}, {"mask": torch.ones(1, 8, 8)}),
        ({"pooled_output": torch.ones(1, 2)}, {}),
        ({"of another pack": np.ones(2)}, {"of another pack": np.zeros(2)}),
        (
            {"of another pack": SimpleNamespace(seen=torch.ones(2))},
            {"of another pack": SimpleNamespace(seen=torch.zeros(2))},
        ),
    ],
)
def test_texts_that_are_limited_differently_are_refused(limits):
    texts = [[[torch.zeros(1, 4, 3), options]] for options in limits]
    with pytest.raises(ValueError, match="positive.*limited alike"):
        stack_conditionings(texts, "positive")


def test_a_common_limit_is_kept():
    limit = {"mask": torch.ones(1, 8, 8), "area": (4, 4, 0, 0), "control": object()}
    foreign = [{"seen": SimpleNamespace(tensor=torch.ones(2), array=np.ones(2))} for _ in range(2)]
    limits = [limit | each for each in foreign]
    limit = limits[0]
    ((_, options),) = stack_conditionings([[[torch.zeros(1, 4, 3), dict(each)]] for each in limits], "positive")
    assert options.keys() == limit.keys()
    assert all(options[name] is limit[name] for name in limit)


def test_an_entry_without_text_is_named():
    with pytest.raises(ValueError, match="positive.*no text"):
        stack_conditionings([text(1), [[None, {}]]], "positive")


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
