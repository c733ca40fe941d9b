"""The words of a prompt as ComfyUI's CLIP tokenizes it, and the nodes' small notations that name some of them."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from comfy.sd import CLIP

from ...editing.inputs import check_text
from ...editing.token_alignment import WORD_END, Prompt, TokenMap, Word, positions, read_prompt

MOST_WORDS = 2000
LONGEST_TEXT = 20_000


def is_text_of(clip: CLIP, text: str, encoded: torch.Tensor) -> bool:
    """Whether `encoded` [tokens, dim], of the text's length or repeated, is what this CLIP makes of a text, up to rounding.

    A LoRA on the CLIP may move it a little.
    """
    own = clip.encode_from_tokens(clip.tokenize(text))[0].to(encoded)
    if own.shape[1] != encoded.shape[1] or len(encoded) % len(own):
        return False
    return bool((encoded[: len(own)] - own).norm() <= 0.1 * own.norm())


def tokenize(clip: CLIP, text: str, socket: str) -> Prompt:
    """The words of a text as this CLIP tokenizes it.

    Raises ValueError if it has none or more than `MOST_WORDS`, or for an unknown tokenizer.
    """
    check_text(text, socket, LONGEST_TEXT)
    tokens = clip.tokenize(text, return_word_ids=True)
    layouts = {tuple(tuple(token[2] for token in row) for row in rows) for rows in tokens.values()}
    if len(layouts) != 1:
        raise ValueError(
            "clip: its encoders split the text differently, so words cannot be matched to attention maps. "
            "Use the CLIP of an SD 1.x, SD 2.x or SDXL model."
        )
    rows = tokens.get("l") or next(iter(tokens.values()))

    def spell(token: int | str) -> str:
        return clip.tokenizer.untokenize([(token, 1.0)])[0][1] if isinstance(token, int) else token + WORD_END

    prompt = read_prompt([[(_identity(token), segment) for token, _, segment in row] for row in rows], spell)
    if not prompt.words:
        raise ValueError(f"{socket}: it is empty. Write the {'edited ' if socket == 'target' else ''}caption.")
    if len(prompt.words) > MOST_WORDS:
        raise ValueError(
            f"{socket}: it has {len(prompt.words)} words, at most {MOST_WORDS} can be matched. Shorten it."
        )
    return prompt


def _identity(token: object) -> object:
    """Tokens that compare equal where they mean the same; those of an embedding are tensors, here named by a digest."""
    if torch.is_tensor(token):
        return hashlib.sha256(token.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()
    return token


def read_factors(text: str) -> list[tuple[str, float]]:
    """(word, factor) of each "word: factor" in lines or between commas. Raises ValueError naming the faulty one."""
    factors = []
    for entry in entries(text):
        word, _, number = entry.rpartition(":")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not word.strip() or not math.isfinite(factor):
            raise ValueError(f"reweight: {entry!r} is not of the form 'word: factor'. Write for example 'fluffy: 2'.")
        factors.append((word.strip(), factor))
    return factors


def entries(text: str) -> list[str]:
    """The words or phrases between commas or in lines."""
    return [entry.strip() for entry in re.split(r"[,\n]", text) if entry.strip()]


def words_of(clip: CLIP, phrase: str, socket: str) -> tuple[Word, ...]:
    """The words of a phrase, to be found in a `Prompt` of `tokenize`."""
    return tokenize(clip, phrase, socket).words


def find_words(read: Callable[[str, str], Sequence[Word]], phrase: str, socket: str, *prompts: Prompt) -> list[Word]:
    """The words of every occurrence of a phrase in some prompts. Raises ValueError, naming `socket`, if there is none.

    `read(phrase, socket)`: the words of a phrase.
    """
    words = read(phrase, socket)
    found = [word for prompt in prompts for word in prompt.find(words)]
    if not found:
        where = "target" if len(prompts) == 1 else "source or target"
        raise ValueError(f"{socket}: {phrase!r} does not occur in {where}. Write it as it stands there.")
    return found


def blend_tokens(
    read: Callable[[str, str], Sequence[Word]],
    phrases: str,
    prompts: tuple[Prompt, Prompt],
    token_map: TokenMap,
    weights: list[tuple[list[Word], float]],
) -> tuple[list[int], list[int]]:
    """Positions of the tokens, in the source and in the target, that local blending draws its mask from.

    `prompts`: (source, target). Those of `phrases`, or of the words that differ, or of those that are weighted. Raises
    ValueError if there are none.
    """
    if entries(phrases):
        for phrase in entries(phrases):
            find_words(read, phrase, "blend_words", *prompts)
        named = [read(phrase, "blend_words") for phrase in entries(phrases)]
        return tuple(positions(word for words in named for word in prompt.find(words)) for prompt in prompts)
    removed, added = (_telling(words) for words in (token_map.removed, token_map.added))
    if not removed and not added:
        added = [word for words, _ in weights for word in words]
    if not removed and not added:
        raise ValueError(
            "local_blend: source and target are the same text, so there is no word to draw the mask from. "
            "Name the words in blend_words, or set local_blend to 0."
        )
    return positions(removed), positions(added)


def _telling(words: Iterable[Word]) -> list[Word]:
    """The words without those like "a" and "with", whose attention is everywhere, unless there are no others."""
    words = list(words)
    return [word for word in words if not word.little] or words
