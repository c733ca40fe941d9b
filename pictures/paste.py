"""Put an edit back into the picture it was made of: what was not edited stays, bit for bit."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..editing.guidance import edit_mask
from ..editing.inputs import check_image, interruptible, rgb
from .regions import CELL, check_mask, read_region, scaled, scaled_mask, shown_by

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
GROW = 0
FEATHER = 4
MATCH_COLOURS = 1.0
KEEP_BELOW = 0.25
GAPS = 12  # gaps in a change are as wide as a sixth of the picture at most
TINT = 0.1  # no model is off by so much


@dataclass(frozen=True)
class Seam:
    """How an edit joins its surroundings.

    `grow`: pixels of the edited picture by which the area is larger. `feather`: pixels over which the edit fades out around
    that. `match_colours`: 0..1, how much of the difference in colour along the seam is taken off the edit. `keep_below`:
    0..1, the source stays wherever the edit differs from it by less than this part of the strongest difference.
    """

    grow: int = GROW
    feather: int = FEATHER
    match_colours: float = MATCH_COLOURS
    keep_below: float = KEEP_BELOW


def paste_edit(
    source: torch.Tensor, edited: torch.Tensor, area: torch.Tensor | None = None, box: Any = None, seam: Seam = Seam()
) -> torch.Tensor:
    """The source with the edit in it: [B, height, width, channels], of the source's size, channels, type and device.

    `source`: [1 or B, height, width, 1 to 4 channels]. `edited`: [1 or B, h, w, 1 to 4 channels], at any size; its alpha
    is not used: the source's stays. `area`: MASK [1 or B, *, *], 1 where the picture was edited, of the edited picture, or
    of the source if it has the source's size and not the edited picture's; None: all. `box`: BOUNDING_BOX, the part of
    the source that `edited` shows; None: the largest part in its middle that has the edited picture's proportions.
    `seam`: how the edit joins its surroundings.

    Raises ValueError: one of them is no picture or mask, batches that do not go together, a box outside the source.
    """
    check_image(source, "source")
    check_image(edited, "edited")
    height, width = whole = tuple(source.shape[1:3])
    small = tuple(edited.shape[1:3])
    region = shown_by(whole, small) if box is None else read_region(box, width, height, "crop_region")
    batches = {"source": source, "edited": edited}
    if area is not None:
        area = check_mask(area, "edited_area").to(source.device)
        if tuple(area.shape[1:]) == whole != small:
            area = region.of(area[..., None])[..., 0]
        batches["edited_area"] = area
    count = _count(**batches)
    result = source.expand(count, -1, -1, -1).clone()
    for number, picture in enumerate(interruptible(result)):
        place, change = region.of(picture), _one(edited, number).to(source.device)
        before = scaled(rgb(place[None]), *small)
        share = edit_share(before, rgb(change), None if area is None else _one(area, number), seam)
        _paste(place, before, change, share, seam.match_colours)
    return result


def edit_share(
    before: torch.Tensor, after: torch.Tensor, area: torch.Tensor | None = None, seam: Seam = Seam()
) -> torch.Tensor:
    """How much of each pixel is taken from the edit: MASK [B, H, W] in 0..1, 0 where the source stays.

    `before`, `after`: [B, H, W, 3]. `area`: MASK [1 or B, *, *], None for all.
    """
    small = tuple(before.shape[1:3])
    mask = before.new_ones(len(before), *small) if area is None else scaled_mask(area, *small)
    if seam.keep_below:
        mask = mask * changed_area(before, after, seam.keep_below)
    return feathered(mask, seam)


def changed_area(before: torch.Tensor, after: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where two pictures [B, H, W, 3] differ by more than `threshold` of their strongest difference: MASK [B, H, W].

    Places that differ little amidst others that do are part of it: an eye stays an eye, and belongs to the new animal all
    the same. Pictures that differ nearly everywhere do so everywhere, as with the sampler's local blend.
    """
    mask = edit_mask((after - before).abs().mean(-1)[:, None], threshold)
    return _closed(mask, max(1, round(min(mask.shape[-2:]) / GAPS)))[:, 0]


def _closed(mask: torch.Tensor, reach: int) -> torch.Tensor:
    """Morphological closing of [B, 1, H, W] by a square: gaps up to twice `reach` are filled."""

    return -largest_around(-largest_around(mask, reach), reach)


def largest_around(values: torch.Tensor, reach: int) -> torch.Tensor:
    """The largest of the values [B, C, H, W] in the square of 2 * `reach` + 1 pixels around each."""
    covered = 0
    while covered < reach:
        # Squares around three places that overlap make one of twice the side: few passes, whatever the reach. No further
        # apart, as at the border there is none around a place outside.
        step = min(covered + 1, reach - covered)
        for kernel, dilation, pad in (((3, 1), (step, 1), (0, 0, step, step)), ((1, 3), (1, step), (step, step, 0, 0))):
            values = F.max_pool2d(F.pad(values, pad, value=-math.inf), kernel, stride=1, dilation=dilation)
        covered += step
    return values


def _one(batch: torch.Tensor, number: int) -> torch.Tensor:
    return batch[min(number, len(batch) - 1)][None]


def _count(**batches: torch.Tensor) -> int:
    """The number of pictures in a batch of each. Raises ValueError for batches that are neither 1 nor alike."""
    count = max(map(len, batches.values()))
    for socket, batch in batches.items():
        if len(batch) not in (1, count):
            sizes = ", ".join(f"{name} {len(each)}" for name, each in batches.items())
            raise ValueError(f"{socket}: batches must be alike or single, and are {sizes}. Give one for each picture.")
    return count


def _paste(
    place: torch.Tensor, before: torch.Tensor, edited: torch.Tensor, share: torch.Tensor, match_colours: float
) -> None:
    """Draw an edit into `place` [height, width, channels], as far as `share` [1, h, w] says.

    `before` [1, h, w, 3]: what is there, at the size of `edited` [1, h, w, channels].
    """
    height, width = place.shape[:2]
    colours = scaled(rgb(edited), height, width)[0]
    if match_colours:
        shift = seam_colours(_drift(before - rgb(edited)), 1 - share)
        colours = colours + match_colours * _spread(shift, height, width)[0]
    colours = colours.clamp(0, 1)
    if place.shape[-1] < 3:
        colours = (colours * colours.new_tensor(GREY)).sum(-1, keepdim=True)
    weight = scaled_mask(share, height, width)[0, ..., None]
    target = place[..., : colours.shape[-1]]
    mixed = torch.lerp(target.float(), colours, weight).to(target)
    target.copy_(torch.where(weight > 0, mixed, target))


def feathered(area: torch.Tensor, seam: Seam) -> torch.Tensor:
    """MASK [B, H, W] larger by `grow` pixels, and falling from there to 0 over `feather` more."""
    from kornia.filters import gaussian_blur2d

    if not area.any():
        return area
    near = (seam.feather + 1) // 2
    reach = seam.grow + near
    grown = largest_around(area[:, None], reach)
    if near:
        # a kernel must not be larger than what it is reflected in
        padded = F.pad(grown, (near,) * 4, mode="replicate")
        grown = gaussian_blur2d(padded, 2 * near + 1, (near / 2, near / 2))[..., near:-near, near:-near]
    return grown[:, 0].clamp(0, 1)


def _drift(difference: torch.Tensor) -> torch.Tensor:
    """The part of a difference [..., channels] that is a tint of the model: what is far larger was edited there."""
    size = difference.abs().amax(-1, keepdim=True)
    return difference / (1 + (size / TINT) ** 4)


def seam_colours(difference: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """A smooth picture that continues `difference` from where it is known: [B, H / 8, W / 8, channels].

    Cloning without a seam (Pérez et al., Poisson Image Editing, 2003) adds what the boundary lacks, continued as smoothly
    as it goes; here by pull and push over a pyramid (Gortler et al., The Lumigraph, 1996, section 4).
    `difference` [B, H, W, channels]; `known` [B, H, W] in 0..1. Where nothing is known the result is 0.
    """
    values, weight = difference.movedim(-1, 1), known[:, None]
    return _pull_and_push(*_coarser(values, weight, CELL)).movedim(1, -1)


def _coarser(values: torch.Tensor, weight: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means of `factor` x `factor` values, and how much of them is known, where a quarter is enough."""
    size = tuple(math.ceil(side / factor) for side in values.shape[-2:])
    total = F.adaptive_avg_pool2d(weight, size)
    mean = F.adaptive_avg_pool2d(values * weight, size) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return mean, (4 * total).clamp_max(1)


def _pull_and_push(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if max(values.shape[-2:]) == 1:
        return values
    coarse = _pull_and_push(*_coarser(values, weight, 2))
    return torch.lerp(F.interpolate(coarse, values.shape[-2:], mode="bilinear"), values, weight)


def _spread(shift: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(shift.movedim(-1, 1), (height, width), mode="bilinear").movedim(1, -1)
