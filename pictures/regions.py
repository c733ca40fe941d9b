"""Parts of a picture that are edited on their own: where they lie, and how they are cut out."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..editing.inputs import check_image, interruptible

CELL = 8
"""Pixels that one value of a latent stands for: sides of a picture to encode are multiples of it."""
WIDEST = 2.0
"""Proportions up to which a model draws as well as it draws squares."""
SHAPES = ("as it is", "square")


@dataclass(frozen=True)
class Region:
    """A rectangle in pixels, `x` and `y` from the left and the top."""

    x: int
    y: int
    width: int
    height: int

    def of(self, picture: torch.Tensor) -> torch.Tensor:
        """The view of [..., height, width, channels] that lies in the rectangle."""
        return picture[..., self.y : self.y + self.height, self.x : self.x + self.width, :]

    def as_box(self) -> dict[str, int]:
        """What a BOUNDING_BOX socket carries."""
        return {"x": self.x, "y": self.y, "width": self.width, "height": self.height}


def read_region(box: Any, width: int, height: int, socket: str) -> Region:
    """The region that a BOUNDING_BOX of a picture of `width` x `height` names.

    Raises ValueError, naming `socket`, for anything else and for a box that is not inside the picture.
    """
    names = ("x", "y", "width", "height")
    if isinstance(box, (list, tuple)) and len(box) == 1:
        (box,) = box
    if not isinstance(box, dict) or not all(isinstance(box.get(name), (int, float)) for name in names):
        raise ValueError(f"{socket}: it is no box of x, y, width and height. Connect crop_region of Crop to Edit.")
    values = [box[name] for name in names]
    region = Region(*(round(value) for value in values)) if all(map(math.isfinite, values)) else Region(0, 0, 0, 0)
    inside = region.x >= 0 and region.y >= 0 and region.x + region.width <= width and region.y + region.height <= height
    if not inside or region.width < 1 or region.height < 1:
        raise ValueError(
            f"{socket}: the box {dict(zip(names, values))} is not inside the picture of {width}x{height}. Connect the "
            "picture that was cropped."
        )
    return region


def shown_by(picture: tuple[int, int], edited: tuple[int, int]) -> Region:
    """The region of a picture that an edited one shows, as far as their sizes (height, width) tell.

    It is what VAE Encode keeps of sides that are no multiples of 8; else the largest part in the middle that has the
    proportions of the edited picture, as Upscale Image with crop `center` takes it.
    """
    height, width = picture
    if edited == (height // CELL * CELL, width // CELL * CELL):
        inner_height, inner_width = edited
    else:
        proportions = edited[1] / edited[0]
        inner_height = max(1, min(height, round(width / proportions)))
        inner_width = max(1, min(width, round(height * proportions)))
    return Region((width - inner_width) // 2, (height - inner_height) // 2, inner_width, inner_height)


def scaled(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, h, w, channels] at another size, float32: bicubic, averaged where it shrinks. Unchanged at its own size."""
    if tuple(picture.shape[1:3]) == (height, width):
        return picture.float()
    values = picture.float().movedim(-1, 1)
    size = (height, width)
    # a cubic overshoots at edges, by no more than the range of the picture
    return F.interpolate(values, size, mode="bicubic", antialias=True).clamp(values.min(), values.max()).movedim(1, -1)


def scaled_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """MASK [B, h, w] at another size: bilinear, averaged where it shrinks."""
    if tuple(mask.shape[1:]) == (height, width):
        return mask
    return F.interpolate(mask[:, None], (height, width), mode="bilinear", antialias=True)[:, 0].clamp(0, 1)


def crop_to_edit(
    image: torch.Tensor, size: int, mask: torch.Tensor | None = None, context: float = 1.5, shape: str = SHAPES[0]
) -> tuple[torch.Tensor, torch.Tensor, Region]:
    """Cut out what is to be edited, at the size that a model draws best.

    `image`: [B, height, width, channels]. `size`: what is cut out has about size² pixels, and sides that are multiples of
    8. `mask`: [1 or B, height, width], 1 on what is to be edited, one region for the batch; None or all 0 takes the
    whole. `context`: how much of the picture around is taken along: sides of the region as multiples of the mask's.
    `shape`: one of `SHAPES`. Returns the picture [B, h, w, channels], the mask [1 or B, h, w] of the same size, all 1
    without a mask, and the region.

    Raises ValueError: not a picture or a mask, or the mask has another size than the picture.
    """
    check_image(image, "image")
    height, width = image.shape[1:3]
    mask = torch.zeros(1, height, width) if mask is None else check_mask(mask, "mask")
    if not mask.any():
        # Load Image gives 64x64 zeros for a picture without transparency
        mask = image.new_ones(1, height, width)
    if tuple(mask.shape[1:]) != (height, width):
        raise ValueError(
            f"mask: it is {mask.shape[2]}x{mask.shape[1]} and the picture {width}x{height}. Give one of the picture's size."
        )
    left, top, right, bottom = _bounds(mask)
    across, down = (right - left) * context, (bottom - top) * context
    if shape == "square":
        across = down = max(across, down)
    across, down = max(across, down / WIDEST), max(down, across / WIDEST)
    across, down = min(across, width), min(down, height)
    if shape == "square":
        across = down = min(across, down)
    drawn = _drawn_size(size, across / down)
    region = _around((left + right) / 2, (top + bottom) / 2, across, down, (width, height))
    pictures = [scaled(region.of(picture), *drawn) for picture in interruptible(image.split(1))]
    return torch.cat(pictures), scaled_mask(region.of(mask[..., None])[..., 0], *drawn), region


def check_mask(mask: torch.Tensor, socket: str) -> torch.Tensor:
    """A MASK as [B, height, width], float32 in 0..1. Raises ValueError, naming `socket`, for anything else, and for NaN."""
    if torch.is_tensor(mask) and mask.ndim == 2:
        mask = mask[None]
    if not torch.is_tensor(mask) or mask.ndim != 3 or not mask.numel():
        found = list(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise ValueError(f"{socket}: expected a mask [batch, height, width], got {found}.")
    if not torch.isfinite(mask).all():
        raise ValueError(f"{socket}: it holds NaN or infinite values. Draw it again.")
    return mask.float().clamp(0, 1)


def _bounds(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is marked, right and bottom excluded; the whole where nothing is."""
    marked = (mask > 0.5).any(0)
    if not marked.any():
        return 0, 0, mask.shape[2], mask.shape[1]
    rows, columns = marked.any(1).nonzero().flatten(), marked.any(0).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _drawn_size(size: int, proportions: float) -> tuple[int, int]:
    """Height and width, multiples of `CELL`, of about size² pixels."""
    sides = size / math.sqrt(proportions), size * math.sqrt(proportions)
    return tuple(max(CELL, round(side / CELL) * CELL) for side in sides)


def _around(x: float, y: float, across: float, down: float, picture: tuple[int, int]) -> Region:
    """The region with its centre at (x, y), moved into the picture."""
    sides = [max(1, min(round(side), whole)) for side, whole in zip((across, down), picture)]
    starts = [min(max(round(at - side / 2), 0), whole - side) for at, side, whole in zip((x, y), sides, picture)]
    return Region(*starts, *sides)
