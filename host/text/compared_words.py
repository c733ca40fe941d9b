"""Which rows of an edited text are compared with which of the source's, where text and picture attend together.

Texts of T5 and language models have a template, an end and padding, which draw most of the attention and say nothing of the
picture. Which rows are words is known of a caption that *Apply Direction* has exchanged words in.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from comfy.sd import CLIP

from .caption_rows import T5_IDS, caption_words, rows_read
from .conditionings import WORDS, Entry

MASK = "attention_mask"  # of the host: [B, rows], 0 for what is not read
Encoded = tuple[torch.Tensor, dict[str, Any]]  # an entry of a CONDITIONING


def word_rows(
    clip: CLIP, edited: str, before: Encoded, after: Encoded, counterparts: Callable[..., torch.Tensor]
) -> tuple[tuple[int, int], ...] | None:
    """((row of a caption, row of the edited one), ..) of the words of an `edited` caption, None where they are not known.

    `before`, `after`: both as they are encoded. `counterparts(rows, rows, encoder)`: the caption's row for each of the edited;
    each is in one pair.
    """
    encoder = "t5xxl" if T5_IDS in after[1] else None
    rows = [rows_read(*encoded) for encoded in (before, after)]
    try:
        words = caption_words(clip, edited, rows[1], "caption", encoder).words
        theirs = counterparts(*rows, encoder).tolist()
    except ValueError:  # no words, or an encoder whose rows are not known
        return None
    pairs = {}  # a word that the caption does not have stands beside another's row, and is left free
    for row in sorted({row for word in words for row in word.positions}):
        pairs.setdefault(theirs[row], row)
    return tuple(pairs.items()) or None


Rows = tuple[int, ...]


def compared_words(source: dict, edited: dict) -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
    """(rows of the source's text, those of the edited one that they are compared with), of two processed entries.

    Both for all pictures or for each. All that both have and that is read, where which of them are words is not known.
    """
    lengths = [rows_read(entry["cross_attn"], entry) for entry in (source, edited)]
    every = tuple((row, row) for row in range(min(lengths)))
    told = [pairs or every for pairs in edited.get(WORDS, (None,))]
    read = [_read(entry, rows) for entry, rows in zip((source, edited), lengths)]
    compared = []
    for i in range(math.lcm(len(told), *map(len, read))):
        own = [rows[i % len(rows)] for rows in read]
        compared.append([pair for pair in told[i % len(told)] if all(row in rows for row, rows in zip(pair, own))])
    if all(pairs == compared[0] for pairs in compared):
        compared = compared[:1]
    one, other = (tuple(tuple(pair[side] for pair in pairs) for pairs in compared) for side in (0, 1))
    return one, other


def _read(entry: dict, rows: int) -> list[set[int]]:
    """Of each text of an entry, or of all, the rows that are read."""
    mask = entry.get(MASK)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] != rows:
        return [set(range(rows))]
    return [{row for row, read in enumerate(of_text) if read} for of_text in mask.bool().tolist()]


def with_compared_words(entries: list[Entry], source: list[dict], edited: list[dict], of_source: bool) -> list[Entry]:
    """The entries of the source's conditioning, or of the edited one, with the `words` that are compared in each."""
    told = []
    for entry, *pair in zip(entries, source, edited):
        words = compared_words(*pair)[0 if of_source else 1]
        own = pair[0 if of_source else 1]
        told.append(replace(entry, words=words, tokens=rows_read(own["cross_attn"], own)))
    return told
