"""Which token of an edited prompt belongs to which token of the source prompt, decided word by word.

For attention maps: Prompt-to-Prompt (Hertz et al., ICLR 2023) section 3.2, word swap, prompt refinement and attention
re-weighting. For edit directions: which rows of two encodings are compared.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

WORD_END = "</w>"
LITTLE_WORDS = frozenset(
    "a an the this that its his her of in on at to by for from with without into onto over under near behind between during "
    "and or but as is are was were wearing having".split()
)


@dataclass(frozen=True)
class Word:
    """A word of a prompt: its tokens, their positions among all tokens of the encoded prompt, and how it is written."""

    tokens: tuple[Hashable, ...]
    positions: tuple[int, ...]
    text: str

    @property
    def little(self) -> bool:
        """Whether it only joins others, as "with" and "," do."""
        return self.text in LITTLE_WORDS or not any(letter.isalnum() for letter in self.text)


@dataclass(frozen=True)
class Chunk:
    """Positions of the tokens around the words in one piece of a prompt; padding is counted from the chunk's start."""

    offset: int
    start: tuple[int, ...]
    end: tuple[int, ...]
    padding: frozenset[int]


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt. `length`: all tokens of all chunks."""

    words: tuple[Word, ...]
    chunks: tuple[Chunk, ...]
    length: int

    def find(self, phrase: Sequence[Word]) -> list[Word]:
        """The words of every occurrence of a phrase, in order; empty if it does not occur."""
        wanted = [word.tokens for word in phrase]
        own = [word.tokens for word in self.words]
        starts = range(len(own) - len(wanted) + 1) if wanted else ()
        inside = {i + n for i in starts if own[i : i + len(wanted)] == wanted for n in range(len(wanted))}
        return [self.words[i] for i in sorted(inside)]


def read_prompt(chunks: Sequence[Sequence[tuple[Hashable, int]]], spell: Callable[[Hashable], str]) -> Prompt:
    """Group the (token, segment) pairs of each chunk into words.

    A word ends after a token that `spell` writes with "</w>" at its end, and where the segment changes; it may go on in
    the next chunk. Segment 0 marks what surrounds the words: start, end and padding.
    """
    words: list[tuple[list, list, list]] = []
    frames = []
    open_segment = None
    offset = 0
    for chunk in chunks:
        inside = [i for i, (_, segment) in enumerate(chunk) if segment]
        first = inside[0] if inside else min(1, len(chunk))
        last = inside[-1] + 1 if inside else first
        frames.append(
            Chunk(
                offset,
                tuple(range(offset, offset + first)),
                tuple(range(offset + last, offset + min(last + 1, len(chunk)))),
                frozenset(range(last + 1, len(chunk))),
            )
        )
        for i in inside:
            token, segment = chunk[i]
            if segment != open_segment:
                words.append(([], [], []))
            spelling = spell(token)
            for parts, part in zip(words[-1], (token, offset + i, spelling.removesuffix(WORD_END))):
                parts.append(part)
            open_segment = None if spelling.endswith(WORD_END) else segment
        offset += len(chunk)
    read = tuple(Word(tuple(tokens), tuple(places), "".join(letters)) for tokens, places, letters in words)
    return Prompt(read, tuple(frames), offset)


def align(
    source: Sequence[Hashable], target: Sequence[Hashable], likeness: Callable[[int], np.ndarray] | None = None
) -> list[tuple[int | None, int | None]]:
    """Needleman-Wunsch alignment of two sequences: (source index, target index) pairs, None where one has no partner.

    As many equal items as possible are paired; then as many unequal ones as possible of `likeness` 2, then of 1, then of
    0; then the earliest. `likeness(i)`: of the source's item i to all of the target, [target items]; 0 everywhere if it is left
    out. Of the table of m x n, two times the square root of m rows are held. ValueError for more than 32,000 items on both
    sides.
    """
    m, n = len(source), len(target)
    base = min(m, n) + 1  # one more than anything can be counted, so that four counts compare as the digits of a number
    if base > 32_000:
        raise ValueError(f"{m} and {n} items are too many to be aligned.")
    number = {item: i for i, item in enumerate(dict.fromkeys((*source, *target)))}
    numbers = np.array([number[item] for item in target], np.int64)

    def merit(i: int) -> np.ndarray:
        alike = np.zeros(n, np.int64) if likeness is None else likeness(i)
        return np.where(numbers == number[source[i]], base**3, (alike == 2) * base**2 + (alike >= 1) * base + 1)

    def above(row: np.ndarray, i: int) -> np.ndarray:
        """The table's row i, from the one below: what can be had from items i and j of both on."""
        best = np.append(np.maximum(row[1:] + merit(i), row[:-1]), 0)
        return np.maximum.accumulate(best[::-1])[::-1]

    step = max(1, math.isqrt(m))
    row = np.zeros(n + 1, np.int64)
    kept = {m: row}
    for i in reversed(range(m)):
        row = above(row, i)
        if i % step == 0:
            kept[i] = row
    pairs: list[tuple[int | None, int | None]] = []
    j = 0
    for first in range(0, m, step):
        last = min(first + step, m)
        rows = {last: kept[last]}
        for i in reversed(range(first, last)):
            rows[i] = above(rows[i + 1], i)
        for i in range(first, last):
            paired = rows[i + 1][1:] + merit(i)
            while j < n and rows[i][j] not in (paired[j], rows[i + 1][j]):
                pairs.append((None, j))
                j += 1
            together = j < n and rows[i][j] == paired[j]
            pairs.append((i, j if together else None))
            j += together
    return pairs + [(None, k) for k in range(j, n)]


def word_pairs(source: Prompt, target: Prompt) -> Iterator[tuple[Word | None, Word | None]]:
    """The words of two prompts in order, each with its partner or None.

    Paired by `align`: equal ones, then little ones with little ones, and rather those that end a phrase, ahead of a
    little word: the nouns.
    """
    ones, others = (np.array(_kinds(prompt.words), np.int64) for prompt in (source, target))

    def likeness(i: int) -> np.ndarray:
        both_little_or_neither = (others < 0) == (ones[i] < 0)
        return both_little_or_neither * (1 + ((ones[i] == 1) & (others == 1)))

    for i, j in align([w.tokens for w in source.words], [w.tokens for w in target.words], likeness):
        yield (None if i is None else source.words[i]), (None if j is None else target.words[j])


@dataclass(frozen=True)
class Partners:
    """Which row of a target prompt's first chunk belongs to which row of the source's.

    `rows`: [length], for each row of the source the target's row, -1 where it has none. `added`: the target's rows of
    words that the source lacks, in order.
    """

    rows: torch.Tensor
    added: tuple[int, ...]


def partner_rows(source: Prompt, target: Prompt, length: int) -> Partners:
    """Partners of the rows of two prompts' first chunks of `length` tokens.

    A kept word meets itself and a word that became another meets that, from their last tokens on, which know the whole
    word in a causal encoder; tokens that are left over are removed or added. Start meets start and end meets end. Padding
    meets the padding at its own position, or where the longer target still has words the first of it: beside what the
    words say it then has the same position embedding. What was removed meets the last of the padding.
    """
    rows = torch.full((length,), -1)
    removed: list[int] = []
    added: list[int] = []
    for before, after in word_pairs(source, target):
        old, new = (word.positions if word else () for word in (before, after))
        shared = min(len(old), len(new))
        removed += old[: len(old) - shared]
        added += new[: len(new) - shared]
        _meet(rows, old[len(old) - shared :], new[len(new) - shared :])
    ours, theirs = source.chunks[0], target.chunks[0]
    _meet(rows, ours.start + ours.end, theirs.start + theirs.end)
    if theirs.padding:
        first, last = min(theirs.padding), max(theirs.padding)
        _meet(rows, sorted(ours.padding), [max(p, first) for p in sorted(ours.padding)])
        _meet(rows, removed, [last] * len(removed))
    return Partners(rows, tuple(p for p in added if p < length))


@dataclass(frozen=True)
class TokenMap:
    """How the maps of the edited prompt follow from those of the source: `source @ mapper + own * target`.

    `mapper`: [S, T], column j the weights of the source tokens in target token j. `own`: [T], 1 for tokens that keep
    their own map. `removed`, `added`: the source's and the target's words that differ.
    """

    mapper: torch.Tensor
    own: torch.Tensor
    removed: tuple[Word, ...]
    added: tuple[Word, ...]

    def edit(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Maps of the edited prompt [..., T] from those of the source [..., S] and its own (section 3.2)."""
        return source @ self.mapper.to(source) + target * self.own.to(target)

    def to(self, device: torch.device) -> "TokenMap":
        """The same on a device."""
        return replace(self, mapper=self.mapper.to(device), own=self.own.to(device))


def map_tokens(source: Prompt, target: Prompt) -> TokenMap:
    """Map the tokens of `source` to those of `target`.

    A word that became another passes on its map: token by token if both have as many, else its sum in equal
    shares. Added words keep their own maps. Start, end and padding follow their counterparts; where the prompts have
    different numbers of chunks, the attention of those is shared out or summed.
    """
    mapper = torch.zeros(source.length, target.length)
    own = torch.zeros(target.length)
    removed, added = [], []
    for before, after in word_pairs(source, target):
        if before is not None and after is not None:
            _pass_on(mapper, before.positions, after.positions)
        elif after is not None:
            own[list(after.positions)] = 1.0
        if before is None or after is None or before.tokens != after.tokens:
            removed += [before] if before else []
            added += [after] if after else []
    for before, after, share in _counterparts(source.chunks, target.chunks):
        for old, new in zip(before.start + before.end, after.start + after.end):
            mapper[old, new] = share
        for i in before.padding & after.padding:
            mapper[before.offset + i, after.offset + i] = share
    frame = [p for c in target.chunks for p in (*c.start, *c.end, *(c.offset + i for i in c.padding))]
    alone = [p for p in frame if not mapper[:, p].any()]
    own[alone] = 1.0
    return TokenMap(mapper, own, tuple(removed), tuple(added))


def column_factors(length: int, factors: Iterable[tuple[Sequence[Word], float]]) -> torch.Tensor:
    """[length] factors of the maps' columns, 1 but at the given words (attention re-weighting, section 3.2)."""
    columns = torch.ones(length)
    for words, factor in factors:
        columns[positions(words)] *= factor
    return columns


def positions(words: Iterable[Word]) -> list[int]:
    """Of all tokens of some words."""
    return [p for word in words for p in word.positions]


def _meet(rows: torch.Tensor, old: Sequence[int], new: Sequence[int]) -> None:
    for p, q in zip(old, new):
        if p < len(rows) and q < len(rows):
            rows[p] = q


def _kinds(words: Sequence[Word]) -> list[int]:
    """-1 for a little word, 1 for one that ends a phrase, 0 for others."""
    ends = [following.little for following in words[1:]] + [True]
    return [-1 if word.little else int(end) for word, end in zip(words, ends)]


def _pass_on(mapper: torch.Tensor, before: Sequence[int], after: Sequence[int]) -> None:
    if len(before) == len(after):
        mapper[list(before), list(after)] = 1.0
    else:
        for p in after:
            mapper[list(before), p] = 1.0 / len(after)


def _counterparts(source: Sequence[Chunk], target: Sequence[Chunk]) -> Iterator[tuple[Chunk, Chunk, float]]:
    """(source chunk, target chunk, share of the source's attention that the target gets)."""
    if len(target) < len(source):
        for i, before in enumerate(source):
            yield before, target[i * len(target) // len(source)], 1.0
        return
    partners = [j * len(source) // len(target) for j in range(len(target))]
    for after, i in zip(target, partners):
        yield source[i], after, 1.0 / partners.count(i)
