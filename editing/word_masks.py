"""Where in a picture some words are drawn: a mask from their cross-attention maps.

Prompt-to-Prompt (Hertz et al., ICLR 2023), local editing, as in its authors' `LocalBlend`.
"""

import torch
import torch.nn.functional as F
from einops import rearrange


class WordMask:
    """Sums the attention that words of one prompt draw, over steps and layers, and thresholds it.

    `tokens`: positions of the words' tokens. `shape`: (height, width) of the maps.
    """

    def __init__(self, tokens: list[int], shape: tuple[int, int]):
        self.tokens = tokens
        self.shape = shape
        self.total = None

    def add(self, maps: torch.Tensor) -> None:
        """Count one layer's maps [B, heads, pixels, tokens] in one step. Raises ValueError for maps of another size."""
        if maps.shape[2] != self.shape[0] * self.shape[1]:
            raise ValueError(
                "model: another patch changes the size of its attention maps (Deep Shrink?), so local_blend cannot sum "
                "them. Remove it, or set local_blend to 0."
            )
        drawn = rearrange(maps[..., self.tokens].sum(-1).mean(1), "b (h w) -> b h w", h=self.shape[0])
        self.total = drawn if self.total is None else self.total + drawn

    def area(self, threshold: float) -> torch.Tensor:
        """[B, 1, height, width] bool: where the words' attention, grown by a pixel, exceeds a share of its range.

        The authors take the share of the maximum; where the least attention is none, that is the same.
        """
        grown = F.max_pool2d(self.total[:, None], 3, 1, 1)
        least, most = grown.amin((2, 3), keepdim=True), grown.amax((2, 3), keepdim=True)
        return grown - least > threshold * (most - least)


def soft_mask(areas: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """The union of areas [B, 1, h, w] at another size, in 0..1: edges are as soft as a pixel of the maps is wide."""
    union = torch.stack(areas).any(0).float()
    return F.interpolate(union, size, mode="bilinear", align_corners=False)
