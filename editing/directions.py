"""Edit directions in text-embedding space: the difference of two mean sentence embeddings.

Paper: Parmar et al., "Zero-shot Image-to-Image Translation" (pix2pix-zero), section 3.2,
"Discovering edit directions". An encoding is a dict of tensors, one per output of the text encoder
("cond" [n, tokens, width], for SDXL also "pooled_output" [n, width]).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from .token_alignment import Partners

Encoding = dict[str, torch.Tensor]
NumberedEncoding = tuple[Sequence[int], Encoding]

# What is subtracted from what: rows at the same position, or rows of the same word.
ALIGNMENTS = ("positions", "words")

# Allows for rounding to half precision and for prompt weighting; encoders with other weights differ by far more.
FIRST_TOKEN_TOLERANCE = 0.05
# Allows for weights rounded to 8 bits: in an encoder of CLIP ViT-L's shape with random weights the start token moves by 0.11
# in e4m3 and by 0.2 in e5m2. Other weights give another token altogether, at about 1.4.
EIGHT_BITS_TOLERANCE = 0.3


@dataclass(frozen=True)
class EditDirection:
    """What has to be added to a caption's encoding to turn the source concept into the target concept."""

    tensors: Encoding
    """Mean difference per text-encoder output, float32, CPU: "cond" [1, tokens, width], "pooled_output" [1, width]."""
    encoder: str
    """Identity of the text encoder, see `host.text_encoding.encoder_fingerprint`."""
    source: str
    target: str
    count: int
    """Sentences averaged on the smaller side."""
    first_token: torch.Tensor | None = None
    """[width]: a causal encoder gives the start token the same vector in every prompt, so it identifies the encoder in
    a conditioning. None when the encoder is not causal."""
    added: torch.Tensor | None = None
    """[1, words, width]: for "cond", what turns the last rows of a caption's padding into the words that the edit adds.
    None when it adds none or was found by positions."""
    parts: tuple[tuple[str, str, float], ...] = ()
    """Of a sum: source, target and weight of each edit in it."""

    @property
    def exchanges(self) -> tuple[tuple[str, str, float], ...]:
        """(source, target, weight) of each edit: the words that are exchanged in a caption which is encoded again."""
        return self.parts or ((self.source, self.target, 1.0),)

    @property
    def words_only(self) -> bool:
        """Whether it holds no vectors, but the words to exchange: of texts without a fixed length."""
        return not self.tensors


class _MeanEncoding:
    """Running mean of encodings, per token position, without holding the sentences' tensors."""

    def __init__(self, chunk_length: int | None):
        self.chunk_length = chunk_length
        self.sums: Encoding = {}
        self.counts: Encoding = {}
        self.count = 0
        self.first_token: torch.Tensor | None = None
        self.first_token_is_constant = True

    def add(self, encodings: Encoding, counted: torch.Tensor | None = None) -> None:
        """`counted` [n, tokens]: which rows of "cond" take part; without it all do."""
        self.count += next(iter(encodings.values())).shape[0]
        for name, rows in encodings.items():
            rows = rows.detach().to("cpu", torch.float64)
            if rows.ndim == 3:
                rows = rows[:, : self.chunk_length]
                if name == "cond":
                    self._watch_first_token(rows[:, 0])
            self._accumulate(name, rows, counted if name == "cond" else None)

    def _accumulate(self, name: str, rows: torch.Tensor, counted: torch.Tensor | None) -> None:
        if counted is not None:
            total, count = (rows * counted.unsqueeze(-1)).sum(0), counted.sum(0).to(rows)
        else:
            total, count = rows.sum(0), torch.full(rows.shape[1:2] if rows.ndim == 3 else (), float(rows.shape[0]))
        if name in self.sums:
            total, old_total = _pad_to_longer(total, self.sums[name])
            count, old_count = _pad_to_longer(count, self.counts[name])
            total, count = total + old_total, count + old_count
        self.sums[name], self.counts[name] = total, count

    def _watch_first_token(self, rows: torch.Tensor) -> None:
        if self.first_token is None:
            self.first_token = rows[0]
        spread = (rows - self.first_token).norm(dim=-1).max()
        self.first_token_is_constant &= bool(spread <= 1e-2 * self.first_token.norm())

    def constant_first_token(self, other: "_MeanEncoding") -> torch.Tensor | None:
        """[width], or None unless every sentence of both means has the same vector there."""
        if self.first_token is None or not (self.first_token_is_constant and other.first_token_is_constant):
            return None
        same = _relative_difference(self.first_token, other.first_token) <= 1e-2
        return self.first_token.float() if same else None

    def mean(self, name: str) -> torch.Tensor:
        total, count = self.sums[name], self.counts[name].clamp_min(1)
        return total / (count.unsqueeze(-1) if count.ndim else count)


def _pad_to_longer(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero-pad the first dimension of the shorter of two sums; other shapes are left alone."""
    if a.ndim == 0 or a.shape[0] == b.shape[0]:
        return a, b
    length = max(a.shape[0], b.shape[0])
    return tuple(torch.cat([x, x.new_zeros(length - x.shape[0], *x.shape[1:])]) for x in (a, b))


def edit_direction(
    source_encodings: Iterable[Encoding],
    target_encodings: Iterable[Encoding],
    chunk_length: int | None = None,
    encoder: str = "",
    source: str = "",
    target: str = "",
) -> EditDirection:
    """Mean encoding of the target sentences minus that of the source sentences (paper section 3.2).

    Both arguments yield batches: dicts of tensors [n, tokens, width] or [n, width]; sizes of batches are free. The mean
    is taken per token position, padding included. Sentences longer than `chunk_length` tokens count with their first
    chunk; without a chunk length, positions that only longer sentences reach are averaged over those.

    Raises ValueError when a side is empty.
    """
    means = []
    for side, encodings in (("source", source_encodings), ("target", target_encodings)):
        mean = _MeanEncoding(chunk_length)
        for batch in encodings:
            mean.add(batch)
        if mean.count == 0:
            raise ValueError(f"{side}: there is no sentence to encode. Give at least one.")
        means.append(mean)
    return _difference(*means, encoder, source, target)


def aligned_direction(
    source_encodings: Iterable[NumberedEncoding],
    target_encodings: Iterable[NumberedEncoding],
    partners: Sequence[Partners],
    chunk_length: int,
    names: tuple[str, str, str] = ("", "", ""),
) -> EditDirection:
    """As `edit_direction`, but word by word: from every row of a source sentence to its partner in the target sentence.

    Words that only one side has would otherwise shift all the others, and the mean would mix differences of unrelated
    words. Both arguments yield (numbers of the pairs, their encodings); `partners`: of each pair, `editing.token_alignment.
    partner_rows`. The mean over pairs stays at the source's position. Words that at least half of the target sentences
    add have no such position: their mean encoding is kept in `added`, to take the place of padding; cross-attention does
    not mind where in a text a word stands. `names`: of encoder, source and target. Without words that
    shift this is `edit_direction`, to the last bit.
    """
    before, after, added = (_MeanEncoding(chunk_length) for _ in range(3))
    for numbers, batch in source_encodings:
        before.add(batch, torch.stack([partners[i].rows >= 0 for i in numbers]))
    longest = max(len(p.added) for p in partners)
    for numbers, batch in target_encodings:
        rows = torch.stack([partners[i].rows for i in numbers])
        after.add({**batch, "cond": _take_rows(batch["cond"], rows)}, rows >= 0)
        if longest:
            places = torch.tensor([[*partners[i].added, *[-1] * (longest - len(partners[i].added))] for i in numbers])
            added.add({"cond": _take_rows(batch["cond"], places)}, places >= 0)
    direction = _difference(before, after, *names)
    words = int((2 * added.counts["cond"] >= len(partners)).sum()) if longest else 0
    if not words:
        return direction
    difference = added.mean("cond")[:words] - after.mean("cond")[-words:]
    return replace(direction, added=difference.float().unsqueeze(0))


def _take_rows(cond: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[n, tokens, width] at rows [n, k], any row where that is -1: [n, k, width]."""
    return cond.gather(1, rows.clamp_min(0).to(cond.device).unsqueeze(-1).expand(-1, -1, cond.shape[-1]))


def _difference(a: _MeanEncoding, b: _MeanEncoding, encoder: str, source: str, target: str) -> EditDirection:
    tensors = {}
    for name in a.sums:
        from_, to = a.mean(name), b.mean(name)
        if from_.ndim == 2:
            tokens = min(from_.shape[0], to.shape[0])
            from_, to = from_[:tokens], to[:tokens]
        tensors[name] = (to - from_).float().unsqueeze(0)
    return EditDirection(tensors, encoder, source, target, min(a.count, b.count), a.constant_first_token(b))


def combine(a: EditDirection, b: EditDirection, weight_a: float, weight_b: float) -> EditDirection:
    """weight_a * a + weight_b * b. Raises ValueError for weights that are no numbers or two different text encoders."""
    for socket, weight in (("weight_a", weight_a), ("weight_b", weight_b)):
        if not math.isfinite(weight):
            raise ValueError(f"{socket}: {weight} is not a number. Give one between -10 and 10.")
    shapes_a = {name: t.shape for name, t in a.tensors.items()}
    shapes_b = {name: t.shape for name, t in b.tensors.items()}
    if not _of_one_encoder(a, b) or shapes_a != shapes_b:
        raise ValueError(
            "direction_a and direction_b come from different text encoders and cannot be added. "
            "Make both with the same CLIP (and the same CLIP skip, in the same precision)."
        )
    # Side by side: words of both edits in the same rows would be neither.
    added = [weight * d.added for weight, d in ((weight_b, b), (weight_a, a)) if d.added is not None]
    return EditDirection(
        tensors={name: weight_a * t + weight_b * b.tensors[name] for name, t in a.tensors.items()},
        encoder=a.encoder,
        source=f"{weight_a:g} x ({a.source}) + {weight_b:g} x ({b.source})",
        target=f"{weight_a:g} x ({a.target}) + {weight_b:g} x ({b.target})",
        count=min(a.count, b.count),
        first_token=a.first_token,
        added=torch.cat(added, 1) if added else None,
        parts=tuple(
            (source, target, own * weight)
            for weight, d in ((weight_a, a), (weight_b, b))
            for source, target, own in d.exchanges
        ),
    )


def apply_direction(
    encoding: torch.Tensor, direction: torch.Tensor, strength: float, added: torch.Tensor | None = None
) -> torch.Tensor:
    """encoding + strength * direction, as a new tensor of the encoding's dtype and device.

    encoding [B, chunks * tokens, width] with direction [1, tokens, width]: added to every row, repeated over the chunks
    of a long prompt. Or [B, width] with [1, width] (pooled). Strength 0 gives the encoding back bit for bit.
    `added` [1, words, width] (see `EditDirection.added`) goes to the last rows of the last chunk, where the padding is.

    Raises ValueError when the shapes do not fit.
    """
    if encoding.shape[-1] != direction.shape[-1] or encoding.ndim != direction.ndim:
        raise ValueError(
            f"conditioning: it holds {encoding.shape[-1]} values per token, the direction {direction.shape[-1]}. "
            "They come from different text encoders: make the direction with the CLIP that encoded the caption."
        )
    if encoding.ndim == 3 and encoding.shape[1] % direction.shape[1]:
        raise ValueError(
            f"conditioning: its {encoding.shape[1]} tokens are not chunks of the direction's {direction.shape[1]}. "
            "They come from different text encoders: make the direction with the CLIP that encoded the caption."
        )
    if strength == 0:
        return encoding.clone()
    if encoding.ndim == 3:
        direction = direction.repeat(1, encoding.shape[1] // direction.shape[1], 1)
    if added is not None:
        words = min(added.shape[1], direction.shape[1])
        direction[:, direction.shape[1] - words :] += added[:, added.shape[1] - words :]
    moved = encoding.float() + strength * direction.to(encoding.device, torch.float32)
    return moved.to(encoding.dtype)


def same_encoder(encoding: torch.Tensor, direction: EditDirection) -> bool:
    """Whether the start token of an encoding [B, tokens, width] is the one of the direction's text encoder.

    Compared up to a common factor, because some prompt-weighting schemes rescale an encoding, and skipped for
    encodings that were zeroed out and for encoders that are not causal.
    """
    first = encoding[:, 0].detach().to("cpu", torch.float64)
    if direction.first_token is None or not first.any():
        return True
    return all(_relative_difference(row, direction.first_token) <= FIRST_TOKEN_TOLERANCE for row in first)


def _of_one_encoder(a: EditDirection, b: EditDirection) -> bool:
    """Whether two directions come from one text encoder, in the same or in two precisions, which have other names.

    Those of words alone are the same for all encoders of a kind.
    """
    if a.encoder == b.encoder:
        return True
    kinds = {(d.encoder.partition("-")[0], d.encoder.partition("-layer")[2]) for d in (a, b)}
    if len(kinds) == 1 and a.words_only and b.words_only:
        return True
    if len(kinds) > 1 or a.first_token is None or b.first_token is None or a.first_token.shape != b.first_token.shape:
        return False
    return _relative_difference(a.first_token, b.first_token) <= EIGHT_BITS_TOLERANCE


def _relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a / a.norm() - b / b.norm()).norm())
