"""How well a block's map agrees with where an edit acts, and which blocks agree best."""

import torch

ROUNDING = 1e-5
"""Part of a map by which fp32 may change it from place to place."""


def agreement(maps: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of two maps [B, pixels], of each picture: [B].

    NaN where one map is the same everywhere but for `ROUNDING`, as that of a whole text is where its words are all that is read.
    """
    wholes = maps.double(), difference.double()
    a, b = (each - each.mean(-1, keepdim=True) for each in wholes)
    lengths = [each.norm(dim=-1) for each in (a, b)]
    told = [length > ROUNDING * whole.norm(dim=-1) for length, whole in zip(lengths, wholes)]
    return torch.where(told[0] & told[1], (a * b).sum(-1) / (lengths[0] * lengths[1]), torch.nan)


def best(scores: list[float], count: int) -> set[int]:
    """Which of some scores are the highest `count`; none if any is NaN."""
    if any(score != score for score in scores):
        return set()
    return set(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])
