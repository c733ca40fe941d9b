"""Which rows of an encoded text are whose words, for T5 and language models, which have no words of their own.

A text is tokenized from its beginning to the end of each word: where it goes on as the whole does, its tokens are counted.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from comfy.sd import CLIP

from ...editing.inputs import check_text
from ...editing.token_alignment import Prompt, Word
from .prompt_words import LONGEST_TEXT, MOST_WORDS
from .text_encoding import CLIPS

T5_IDS = "t5xxl_ids"  # of Anima, whose model reads these tokens' rows in place of the text's own
WORD = re.compile(r"\w+(?:[-'’]\w+)*")
UNKNOWN = (
    "clip: how its rows belong to words is not known, so there is nothing to show by words. Connect the CLIP that encoded "
    "the caption of the inversion."
)


def caption_words(clip: CLIP, text: str, rows: int, socket: str, encoder: str | None = None) -> Prompt:
    """The words of a text, with the rows that stand for each in its encoding of so many `rows`.

    `encoder`: whose tokens the rows are, by the name of the host's tokenizer, where it is known. A word that stands in the
    encodings of two, as in SD 3, has rows in both. Raises ValueError for an empty text, one with too many words, and rows
    that are not the text's tokens.
    """
    check_text(text, socket, LONGEST_TEXT)
    spans = [found.span() for found in WORD.finditer(text)]
    if not spans:
        raise ValueError(f"{socket}: it is empty. Write the {'edited ' if socket == 'target' else ''}caption.")
    if len(spans) > MOST_WORDS:
        raise ValueError(f"{socket}: it has {len(spans)} words, at most {MOST_WORDS} can be told apart. Shorten it.")
    whole = _tokens(clip, text)
    parts = _parts(whole, _tokens(clip, ""), rows, encoder)
    after = _tokens(clip, f"{text} {text[slice(*spans[0])]}")
    words = []
    for first, last in spans:
        before = _tokens(clip, text[:first].rstrip())
        through = _tokens(clip, text[:last]) if text[last:].strip() else after
        positions = []
        for part in parts:
            start, stop = (_common(whole[part.name], side[part.name]) for side in (before, through))
            positions += [part.offset + i for i in range(start, stop) if 0 <= part.offset + i < rows]
        spelled = text[first:last].lower()
        words.append(Word((spelled,), tuple(positions), spelled))
    return Prompt(tuple(words), (), rows)


def rows_read(text: torch.Tensor, options: dict[str, Any]) -> int:
    """How many rows of a text [B, rows, width] a model reads, with the options of its entry."""
    ids = options.get(T5_IDS)
    return text.shape[1] if ids is None else ids.shape[-1]


def phrase_words(clip: CLIP, phrase: str, socket: str) -> list[Word]:
    """The words of a phrase, to be found in a `Prompt` of `caption_words`."""
    check_text(phrase, socket, LONGEST_TEXT)
    return [Word((found.group().lower(),), (), found.group().lower()) for found in WORD.finditer(phrase)]


@dataclass(frozen=True)
class _Part:
    """An encoder whose token i is row `offset` + i."""

    name: str
    offset: int


def _parts(whole: dict[str, list], empty: dict[str, list], rows: int, encoder: str | None) -> list[_Part]:
    """The encoders whose rows an encoding is: one, less a template that is cut off in front, or a CLIP and one behind it."""
    for name in (encoder,) if encoder else whole:
        cut = len(whole[name]) - rows
        if cut == 0 or cut > 0 and whole[name][:cut] == empty[name][:cut]:
            return [_Part(name, -cut)]
    for clip in CLIPS:
        for other in whole:
            if clip in whole and other not in CLIPS and len(whole[clip]) + len(whole[other]) == rows:
                return [_Part(clip, 0), _Part(other, len(whole[clip]))]
    raise ValueError(UNKNOWN)


def _tokens(clip: CLIP, text: str) -> dict[str, list]:
    return {name: [_identity(token[0]) for row in rows for token in row] for name, rows in clip.tokenize(text).items()}


def _identity(token: Any) -> Any:
    return token if isinstance(token, int) else id(token)


def _common(one: list, other: list) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
