"""Move a CONDITIONING by encoding its caption again with the words of a direction exchanged, see `editing.word_exchange`."""

import itertools
from typing import Any

import torch
from comfy.sd import CLIP

from ...editing.directions import EditDirection
from ...editing.word_exchange import between, counterparts, exchange_words
from .. import running
from ..messages import TOKEN_NUMBERS
from .compared_words import Encoded, word_rows
from .conditionings import WORDS
from .text_encoding import CLIPS, check_conditioning, chunk_length

# By the names that the host's tokenizers have: those whose texts stand in an option of their own.
OF_ENCODER = {"conditioning_llama3": "llama", "conditioning_byt5small": "byt5"}
TOLERANCE = 0.1  # a LoRA on the CLIP may move a text a little


def exchange_conditioning(
    conditioning: list, direction: EditDirection, strength: float, clip: CLIP, caption: str
) -> list:
    """A CONDITIONING, of which each entry is `caption` as the CLIP encodes it, moved towards the exchanged caption.

    At strength 0 it is as it came, at 1 the exchanged caption; its other options stay. Raises ValueError naming the
    socket where the caption is another text, lacks the word, or cannot be compared token by token.
    """
    check_conditioning(conditioning, "conditioning")
    weights = {weight for _, _, weight in direction.exchanges}
    if len(weights) > 1:
        raise ValueError(
            "direction: its edits have different weights, and words are exchanged all together. Give both the same weight."
        )
    edited = caption
    for source, target, _ in direction.exchanges:
        edited = exchange_words(edited, source, target)
    strength *= weights.pop()
    if strength == 0:
        return [[text, dict(options)] for text, options in conditioning]
    (before, had), (after, has) = (_encoded(clip, text) for text in (caption, edited))
    if any(not _same_text(text, before) for text, _ in conditioning):
        raise ValueError(
            "caption: the conditioning is not this text, encoded by this CLIP. Connect the text and the CLIP of the CLIP Text "
            "Encode that made it."
        )
    rows = _Rows(clip, caption, edited)
    words = word_rows(clip, edited, (before, had), (after, has), rows.of) if chunk_length(clip) is None else None
    rows = rows if strength != 1 else None
    text = _moved(before, after, rows, strength)
    named = {name: _moved(had.get(name), value, rows, strength, OF_ENCODER.get(name)) for name, value in has.items()}
    if strength != 1 and any(_differ(had.get(name), value) for name, value in has.items() if not _can_mix(value)):
        running.warn(TOKEN_NUMBERS)
    words_of = {} if words is None else {WORDS: (words,)}
    return [
        [
            text.expand(len(own), -1, -1),
            {**{name: value for name, value in options.items() if name not in had}, **named, **words_of},
        ]
        for own, options in conditioning
    ]


def _encoded(clip: CLIP, text: str) -> Encoded:
    ((cond, options),) = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return cond, options


def _same_text(text: torch.Tensor, own: torch.Tensor) -> bool:
    if text.shape[1:] != own.shape[1:]:
        return False
    own = own.to(text)
    return all(bool((row - own[0]).norm() <= TOLERANCE * own.norm()) for row in text)


def _can_mix(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point() and value.ndim > 1


def _differ(a: Any, b: Any) -> bool:
    return torch.is_tensor(b) and not (torch.is_tensor(a) and a.shape == b.shape and torch.equal(a, b))


def _moved(source: Any, target: Any, rows: "_Rows | None", strength: float, encoder: str | None = None) -> Any:
    if rows is None or not _can_mix(target) or not torch.is_tensor(source):
        return target
    if target.ndim == 2:
        return between(source, target, None, strength)
    return between(source, target, rows.of(source.shape[-2], target.shape[-2], encoder), strength)


class _Rows:
    """Which rows of two encodings stand for the same words, by the tokens of the encoders."""

    def __init__(self, clip: CLIP, source: str, target: str):
        sides = [clip.tokenize(text) for text in (source, target)]
        self._tokens = [
            {name: [_identity(token[0]) for row in rows for token in row] for name, rows in side.items()}
            for side in sides
        ]

    def of(self, before: int, after: int, encoder: str | None = None) -> torch.Tensor:
        """For each of `after` rows of the target, its row among `before` of the source.

        They are the tokens of one encoder, of that one or of any, without those of a template that is cut off in front; or
        those of a CLIP and another encoder, end to end, as in SD 3. Raises ValueError if they are neither.
        """
        source, target = self._tokens
        pairs = [(clip, other) for clip in CLIPS if clip in source for other in source if other not in CLIPS]
        for names in ((encoder,),) if encoder else (*((name,) for name in source), *pairs):
            sides = [list(itertools.chain(*(side[name] for name in names))) for side in (source, target)]
            cut = len(sides[0]) - before
            if cut == len(sides[1]) - after and (cut == 0 or (cut > 0 and len(names) == 1)):
                if sides[0][:cut] == sides[1][:cut]:
                    return counterparts(sides[0][cut:], sides[1][cut:])
        raise ValueError(
            "strength: how this text encoder's rows belong to words is not known, so there is nothing between the caption and "
            "the exchanged one. Set it to 0 or 1."
        )


def _identity(token: Any) -> Any:
    return token if isinstance(token, int) else id(token)
