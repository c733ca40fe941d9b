"""How well a block's map agrees with where an edit acts, and which blocks agree best."""

import torch


def agreement(maps: torch.Tensor, difference: torch.Tensor) -> float:
    """Pearson's correlation of two maps [B, pixels], the mean of the batch; NaN where one is the same everywhere."""
    a, b = (each.double() - each.double().mean(-1, keepdim=True) for each in (maps, difference))
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())


def best(scores: list[float], count: int) -> set[int]:
    """Which of some scores are the highest `count`; none if any is NaN."""
    if any(score != score for score in scores):
        return set()
    return set(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])
