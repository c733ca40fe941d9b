"""One text per picture: what to do when a socket brings a list.

ComfyUI runs a node once per item of a list. That is right for a list of pictures, but a batch of B pictures captioned one
by one arrives as one latent and B texts, and these belong in one run, text i with picture i.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from .progress import runs

TEXT_LENGTHS = "pix2pix_zero_text_lengths"  # in a conditioning's options: of each row, before it was repeated


def stack_conditionings(conditionings: list[list], socket: str) -> list:
    """Several CONDITIONINGs as one with a row for each. A single one is returned as it is.

    Texts of unequal length are repeated to a common one, which leaves cross-attention as it was; their own are in the
    options, as `TEXT_LENGTHS`. Raises ValueError if they have unequal numbers of parts or come from different text
    encoders.
    """
    if len(conditionings) == 1:
        return conditionings[0]
    if len({len(conditioning) for conditioning in conditionings}) > 1:
        raise ValueError(f"{socket}: the texts of one batch must be combined alike. Encode each with the same nodes.")
    return [_stack_entries(entries, socket) for entries in zip(*conditionings)]


def _stack_entries(entries: tuple, socket: str) -> list:
    texts = [text for text, _ in entries]
    if len({text.shape[2:] for text in texts}) > 1:
        raise ValueError(f"{socket}: the texts of one batch come from different text encoders. Use one CLIP.")
    lengths = tuple(text.shape[1] for text in texts)
    tokens = math.lcm(*lengths)
    extras = dict(entries[0][1])
    if len(set(lengths)) > 1:
        extras[TEXT_LENGTHS] = lengths
    if extras.get("pooled_output") is not None:
        extras["pooled_output"] = torch.cat([extra["pooled_output"] for _, extra in entries])
    return [torch.cat([text.repeat(1, tokens // text.shape[1], 1) for text in texts]), extras]


def run_per_picture(
    run: Callable[..., tuple],
    inputs: dict[str, list],
    batches: list[int],
    texts: tuple[str, ...],
    join: Callable[[list, str], Any] = stack_conditionings,
) -> list[list]:
    """Call `run` for each item of the lists as ComfyUI would, after joining the texts of a batch.

    `inputs`: every socket's list. `batches`: pictures in each item of the picture socket's list; if it has one item and
    a socket of `texts` brings a text for each of its pictures, they are joined, by default to one conditioning. Returns one
    list per output of `run`.
    """
    for name in texts:
        if len(batches) == 1 and len(inputs[name]) == batches[0]:
            inputs = {**inputs, name: [join(inputs[name], name)]}
    count = max(map(len, inputs.values()))
    results = [run(**{name: items[min(i, len(items) - 1)] for name, items in inputs.items()}) for i in runs(count)]
    return [list(column) for column in zip(*results)]
