"""The attention that each token draws over a picture, averaged over heads, layers and steps (DAAM, Tang et al., ACL 2023).

The mean of probabilities stays one: at every pixel the heat of all tokens sums to 1.
"""

import torch
import torch.nn.functional as F
from einops import reduce


class AttentionHeat:
    """Sums cross-attention maps, each at its own size. `length`: tokens of the text."""

    def __init__(self, length: int):
        self.length = length
        self._totals: dict[tuple[int, int], torch.Tensor] = {}
        self._count = 0

    def add(self, maps: torch.Tensor, shape: tuple[int, int]) -> None:
        """Count one layer's maps [B, heads, pixels, tokens] in one step; `shape` is their (height, width).

        Texts of a batch are repeated to a common length (`host.text.conditionings`); their repeats count as one. Raises
        ValueError for maps of another size.
        """
        if maps.shape[2] != shape[0] * shape[1]:
            raise ValueError(
                "model: another patch changes the size of its attention maps (Deep Shrink?), so they cannot be shown. "
                "Remove it."
            )
        drawn = reduce(maps.mean(1), "b (h w) (repeats n) -> b h w n", "sum", h=shape[0], n=self.length)
        self._totals[shape] = drawn + self._totals.get(shape, 0.0)
        self._count += 1

    def mean(self, size: tuple[int, int]) -> torch.Tensor:
        """The heat at one size: [B, length, height, width]."""
        total = 0.0
        for maps in self._totals.values():
            total = total + F.interpolate(maps.movedim(-1, 1), size, mode="bilinear", align_corners=False)
        return total / self._count
