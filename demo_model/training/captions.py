"""Captions as rows of the shared embedding, for training and for the id table that ships with the weights."""

import random
from dataclasses import replace

import torch
from torch import Tensor

from ..networks import CONTEXT_LENGTH, EMBEDDING_ROWS, SHARED_ROWS, DemoTokenizer
from ..scene import FURS, STYLES, SUBJECTS, Scene, sample_scene
from ..scene_captions import FILLERS, caption

FIRST_SHARED = EMBEDDING_ROWS - SHARED_ROWS
START, END = 49406, 49407


class Vocabulary:
    """Words of the caption grammar and their rows. Filler words become random shared rows, so those turn neutral."""

    def __init__(self, samples: int = 20000) -> None:
        rng = random.Random(5)
        words = set()
        for seed in range(samples):
            words.update(caption(sample_scene(rng), rng).split())
        words.update(
            caption(sample_scene(rng, subject=s, style=t, fur=f)) for s in SUBJECTS for t in STYLES for f in FURS
        )
        words = sorted({w for text in words for w in text.split()} - set(FILLERS))
        tokenizer = DemoTokenizer().clip_l
        ids = {w: [i for i, _ in tokenizer.tokenize_with_weights(w)[0] if i not in (START, END)] for w in words}
        self.known = sorted({START, END, *(i for tokens in ids.values() for i in tokens)})
        if len(self.known) > FIRST_SHARED:
            raise ValueError(f"the caption grammar needs {len(self.known)} rows, the embedding has {FIRST_SHARED}")
        row = {token: k for k, token in enumerate(self.known)}
        self.rows = {w: [row[i] for i in tokens] for w, tokens in ids.items()}
        self.start, self.end = row[START], row[END]

    def fill_table(self, table: Tensor) -> None:
        """Point the known token ids at their own rows."""
        table[torch.tensor(self.known)] = torch.arange(len(self.known), dtype=table.dtype)

    def encode(self, text: str, rng: random.Random, most_insertions: int = 0) -> list[int]:
        """Rows of `text`, padded to the context length; up to `most_insertions` filler words at random places."""
        rows = []
        for word in text.split():
            rows.extend(self.rows.get(word) or [rng.randrange(FIRST_SHARED, EMBEDDING_ROWS)])
        for _ in range(rng.randint(0, most_insertions)):
            rows.insert(rng.randint(0, len(rows)), rng.randrange(FIRST_SHARED, EMBEDDING_ROWS))
        rows = [self.start, *rows[: CONTEXT_LENGTH - 2], self.end]
        return rows + [self.end] * (CONTEXT_LENGTH - len(rows))


def changed(scene: Scene, rng: random.Random) -> Scene:
    """`scene` with another subject, or sometimes with another accessory, hour, season or style."""
    field = rng.choices(("subject", "glasses", "night", "winter", "style"), (5, 1, 1, 1, 1))[0]
    if field in ("glasses", "night", "winter"):
        return replace(scene, **{field: not getattr(scene, field)})
    choices = SUBJECTS if field == "subject" else STYLES
    return replace(scene, **{field: rng.choice([c for c in choices if c != getattr(scene, field)])})


class CaptionSampler:
    """Draws what the text encoder sees for a batch of scenes.

    A few captions are replaced by an edited one: the caption of the scene with one thing changed, plus the mean
    difference of a few sentences with and without that change. Large text encoders are additive in this way by sheer
    scale; a tiny one has to be shown, and edit directions rely on it.
    """

    SENTENCES = 3

    def __init__(self, vocabulary: Vocabulary, seed: int, empty: float = 0.12, edited: float = 0.1) -> None:
        self.vocabulary, self.rng, self.empty, self.edited = vocabulary, random.Random(seed), empty, edited

    def _rows(self, scene: Scene, canonical: bool = False) -> list[int]:
        rng = self.rng
        if canonical or rng.random() < 0.3:
            return self.vocabulary.encode(caption(scene), rng)
        return self.vocabulary.encode(caption(scene, rng), rng, rng.choice((0, 0, 3, 8)))

    def __call__(self, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        """Rows [R, 77] to encode and mixing weights [B, R]: the context of scene b is `sum_r weights[b, r] text(rows[r])`."""
        rng, rows, mix = self.rng, [], []
        for scene in scenes:
            draw = rng.random()
            if draw < self.empty:
                mix.append([(len(rows), 1.0)])
                rows.append(self.vocabulary.encode("", rng))
            elif draw < self.empty + self.edited:
                source = changed(scene, rng)
                entry = [(len(rows), 1.0)]
                rows.append(self._rows(source, canonical=True))
                fields = {
                    k: (getattr(scene, k), getattr(source, k))
                    for k in ("subject", "glasses", "night", "winter", "style")
                }
                for _ in range(self.SENTENCES):
                    other, wording = sample_scene(rng), rng.randrange(1 << 30)
                    for sign, side in ((1, 0), (-1, 1)):
                        changes = {k: v[side] for k, v in fields.items() if v[0] != v[1]}
                        words = random.Random(wording)
                        text = caption(replace(other, **changes), words)
                        entry.append((len(rows), sign / self.SENTENCES))
                        rows.append(self.vocabulary.encode(text, random.Random(wording), 4))
                mix.append(entry)
            else:
                mix.append([(len(rows), 1.0)])
                rows.append(self._rows(scene))
        weights = torch.zeros(len(scenes), len(rows))
        for b, entry in enumerate(mix):
            for r, w in entry:
                weights[b, r] = w
        return torch.tensor(rows), weights
