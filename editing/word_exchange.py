"""A caption with a concept exchanged for another, and its encoding on the way from one to the other.

Texts of T5 and of language models have no fixed length, so that the same position means another word in another sentence. A
caption that is encoded again with the word exchanged is exact; rows are compared with those of the same tokens.
"""

import re
from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher

import torch

from .sentences import indefinite, split_tail


def exchange_words(caption: str, source: str, target: str) -> str:
    """The caption with every occurrence of a concept exchanged, in whatever case, with its article and plural.

    Raises ValueError if it does not occur.
    """
    source = re.sub(r"^(a|an|the)\s+(?=\S)", "", source.strip(), flags=re.IGNORECASE)
    target = re.sub(r"^(a|an|the)\s+(?=\S)", "", target.strip(), flags=re.IGNORECASE)
    pattern = rf"(?<!\w)(?P<article>an?\s+)?{re.escape(source)}(?P<plural>s?)(?!\w)"

    def exchanged(found: re.Match) -> str:
        phrase = target + found["plural"] if not target.endswith("s") else target
        if not found["article"]:
            return phrase
        if not found["plural"]:
            thing, tail = split_tail(phrase)  # "a cat wearing glasses" has its article by the cat
            phrase = " ".join(part for part in (indefinite(thing) if thing else "", tail) if part)
        return phrase[:1].upper() + phrase[1:] if found["article"][0].isupper() else phrase

    edited, count = re.subn(pattern, exchanged, caption, flags=re.IGNORECASE)
    if not count:
        raise ValueError(
            f"caption: {source!r} does not occur in it. Write it into the caption, or make the direction from a word that does."
        )
    return edited


def differing_words(source: str, target: str) -> tuple[str, str]:
    """What two sentences differ in: the words between what they begin and end with alike.

    Where one only has words more, the word before them belongs to both, or the one after them.
    """
    before, after = source.split(), target.split()
    start = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
    rest = min(len(before), len(after)) - start
    end = next((i for i in range(rest) if before[-1 - i] != after[-1 - i]), rest)
    if min(len(before), len(after)) - end == start:
        start, end = (start - 1, end) if start else (start, max(end - 1, 0))
    return tuple(" ".join(words[start : len(words) - end]) for words in (before, after))


def counterparts(source: Sequence[Hashable], target: Sequence[Hashable]) -> torch.Tensor:
    """For each token of the target, that of the source which it is compared with: int64 [tokens].

    Equal tokens stand beside themselves, words that are exchanged beside those in their place, an added word beside what
    it follows.
    """
    rows = torch.zeros(len(target), dtype=torch.int64)
    for kind, first, last, start, stop in SequenceMatcher(None, source, target, autojunk=False).get_opcodes():
        for i in range(start, stop):
            if kind == "insert":
                rows[i] = max(first - 1, 0)
            elif kind == "equal":
                rows[i] = first + i - start
            else:
                rows[i] = first + (i - start) * (last - first) // (stop - start)
    return rows


def between(source: torch.Tensor, target: torch.Tensor, rows: torch.Tensor | None, strength: float) -> torch.Tensor:
    """The encoding [.., tokens, width] at `strength` on the way from a source to a target, whose length it has.

    `rows`: `counterparts` of the target's tokens, or None where none are counted, as in pooled texts. At 1 it is the target
    bit for bit.
    """
    if strength == 1:
        return target.clone()
    start = source if rows is None else source.index_select(-2, rows.to(source.device))
    return (start.float() + strength * (target.to(start).float() - start.float())).to(target.dtype)
