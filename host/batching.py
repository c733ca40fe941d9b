"""Lists on sockets: what a node that edits batches does when a socket brings a list.

ComfyUI runs a node once per item of a list. That is right for a list of pictures, but a batch of B pictures captioned one
by one arrives as one latent and B texts, and these belong in one run, text i with picture i.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io

from .progress import runs

TEXT_LENGTHS = "pix2pix_zero_text_lengths"  # in a conditioning's options: of each row, before it was repeated


def stack_conditionings(conditionings: list[list], socket: str) -> list:
    """Several CONDITIONINGs as one with a row for each. A single one is returned as it is.

    Texts of unequal length are repeated to a common one, which leaves cross-attention as it was; their own are in the
    options, as `TEXT_LENGTHS`. Raises ValueError if they have unequal numbers of parts, come from different text encoders
    or are limited differently, by a mask, an area, a time range or a ControlNet.
    """
    if len(conditionings) == 1:
        return conditionings[0]
    if len({len(conditioning) for conditioning in conditionings}) > 1:
        raise ValueError(f"{socket}: the texts of one batch must be combined alike. Encode each with the same nodes.")
    return [_stack_entries(entries, socket) for entries in zip(*conditionings)]


def _stack_entries(entries: tuple, socket: str) -> list:
    texts = [text for text, _ in entries]
    if any(text is None for text in texts):
        raise ValueError(f"{socket}: one of its entries has no text. Encode each with CLIP Text Encode.")
    if len({text.shape[2:] for text in texts}) > 1:
        raise ValueError(f"{socket}: the texts of one batch come from different text encoders. Use one CLIP.")
    lengths = tuple(text.shape[1] for text in texts)
    tokens = math.lcm(*lengths)
    extras = _common_options([options for _, options in entries], socket)
    if len(set(lengths)) > 1:
        extras[TEXT_LENGTHS] = lengths
    return [torch.cat([text.repeat(1, tokens // text.shape[1], 1) for text in texts]), extras]


def _common_options(options: list[dict], socket: str) -> dict:
    """The options that all entries have, with the pooled texts as rows."""
    pooled = [each.get("pooled_output") for each in options]
    others = [{name: value for name, value in each.items() if name != "pooled_output"} for each in options]
    if any(not _equal(each, others[0]) for each in others) or len({value is None for value in pooled}) > 1:
        raise ValueError(
            f"{socket}: the texts of one batch must be limited alike (mask, area, time range, ControlNet). Use one limit for "
            "all, or edit the pictures one by one, as a list."
        )
    if pooled[0] is None:
        return dict(options[0])
    return {**options[0], "pooled_output": torch.cat(pooled)}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b.to(a))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (type(a) is type(b) and bool(a == b))


def per_picture(
    pictures: str,
    texts: tuple[str, ...],
    join: Callable[[list, str], Any] = stack_conditionings,
    finish: Callable[..., None] | None = None,
) -> Callable:
    """Decorator of a node's `execute` that is written for one batch, where the node takes lists (`is_input_list`).

    `execute` is called for each item of the lists as ComfyUI would, with the texts of a batch joined; the node gives a list per
    output. `pictures`: the socket that brings the batches. `texts`: sockets with a text for each batch, for each picture
    of all batches, for a single one as many as wanted, or one for all. `join`: the texts of a batch as one. `finish`:
    called with the lists of all outputs.
    """

    def decorate(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
        @functools.wraps(execute)
        def execute_lists(cls, **inputs: list) -> io.NodeOutput:
            items = dict(_each_with_its_texts(inputs, pictures, texts, join))
            results = []
            for run in runs(max(map(len, items.values()))):
                # The host repeats the last item of a shorter list.
                one = {name: values[min(run, len(values) - 1)] for name, values in items.items()}
                results.append(execute(cls, **one).result)
            outputs = [list(column) for column in zip(*results)]
            if finish is not None:
                finish(*outputs)
            return io.NodeOutput(*outputs)

        return execute_lists

    return decorate


def _each_with_its_texts(inputs: dict[str, list], pictures: str, texts: tuple[str, ...], join: Callable):
    for name, values in inputs.items():
        if not values:
            raise ValueError(f"{name}: the list is empty. Connect at least one.")
    sizes = [_batch(item) for item in inputs[pictures]]
    for name, values in inputs.items():
        yield name, _split(values, name, sizes, join) if name in texts else values


def _split(texts: list, socket: str, sizes: list[int], join: Callable) -> list:
    """One text for each batch, of `sizes` pictures, or as many as there are for a single picture."""
    if len(texts) in (1, len(sizes)) or sizes == [1]:
        return texts
    if len(texts) != sum(sizes):
        raise ValueError(
            f"{socket}: it brings {len(texts)} texts for {sum(sizes)} pictures in {len(sizes)} batches. Give one for each "
            "picture, or one for all."
        )
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [join(texts[start : start + size], socket) for start, size in zip(starts, sizes)]


def _batch(item: Any) -> int:
    """Pictures in a LATENT or an inversion."""
    return len(item["samples"]) if isinstance(item, dict) else item.batch
