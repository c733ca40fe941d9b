"""Heat over a picture, as *Attention Heatmap* shows it."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import charts

SMALLEST = 384
"""Smaller pictures are enlarged, so that labels fit under them."""

PALETTE = np.array(
    [
        [0, 0, 4],
        [33, 12, 74],
        [87, 16, 110],
        [137, 34, 106],
        [187, 55, 84],
        [227, 89, 51],
        [249, 140, 10],
        [249, 201, 50],
        [252, 255, 164],
    ]
)
"""The colours of "inferno", evenly spaced: equal steps of heat look equal, in grey too."""


def draw_heat(heat: torch.Tensor, label: str, image: torch.Tensor | None, scale: int) -> Image.Image:
    """The heat [H, W] in colours, over the picture if there is one, with the word and the largest share under it.

    `scale`: pixels of the picture to one of the heat.
    """
    size = [scale * side for side in heat.shape] if image is None else image.shape[:2]
    enlarged = -(-SMALLEST // min(size))
    height, width = (enlarged * side for side in size)
    low, high = float(heat.min()), float(heat.max())
    even = ((heat - low) / max(high - low, 1e-12))[None, None]
    even = F.interpolate(even, (height, width), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1).numpy()
    places = np.linspace(0, 1, len(PALETTE))
    colours = np.stack([np.interp(even, places, PALETTE[:, i]) for i in range(3)], -1)
    if image is not None:
        below = charts.as_pillow(image).resize((width, height), Image.Resampling.BICUBIC).convert("L")
        share = 0.35 + 0.4 * even[..., None]
        colours = share * colours + (1 - share) * np.asarray(below, dtype=np.float64)[..., None]
    line = max(36, round(min(height, width) / 14))
    sheet = charts.Sheet(width, height + line)
    sheet.paste(Image.fromarray(colours.round().astype(np.uint8)), 0, 0, width, height, Image.Resampling.NEAREST)
    sheet.text((12, height + line / 2), label, 0.5 * line, anchor="lm", within=0.6 * width)
    sheet.text((width - 12, height + line / 2), f"up to {high:.0%} of attention", 0.4 * line, charts.FAINT_INK, "rm")
    return sheet.finish()
