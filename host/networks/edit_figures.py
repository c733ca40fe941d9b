"""Measure edits against their sources, picture by picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F

from ...editing import metrics
from ...editing.inputs import check_image, check_text, interruptible, rgb
from .metric_models import ClipJudge, DinoJudge, LpipsJudge

Figures = TypeVar("Figures")
LONGEST_TEXT = 1_000_000  # a line for each of some thousand pictures


@dataclass(frozen=True)
class EditFigures:
    """The figures of one picture, NaN where one was not measured.

    `psnr` (dB), `ssim`, `mse` and `lpips` compare what lies outside the mask, or everything without one. The CLIP
    similarities are those of the edited picture with the target text, 0 to 100.
    """

    psnr: float = math.nan
    ssim: float = math.nan
    mse: float = math.nan
    mse_inside: float = math.nan
    lpips: float = math.nan
    structure_distance: float = math.nan
    clip_similarity: float = math.nan
    clip_similarity_inside: float = math.nan
    clip_accuracy: float = math.nan


@dataclass(frozen=True)
class Judges:
    """The networks to measure with, where the user has chosen them."""

    clip: ClipJudge | None = None
    dino: DinoJudge | None = None
    lpips: LpipsJudge | None = None


@dataclass(frozen=True)
class EditedPicture:
    """A source and its edit, [1, H, W, 3] in 0..1, the mask [1, H, W] of what was to change, and the two texts."""

    source: torch.Tensor
    edited: torch.Tensor
    mask: torch.Tensor | None = None
    source_text: str = ""
    target_text: str = ""


def pair_pictures(
    source: Sequence[torch.Tensor],
    edited: Sequence[torch.Tensor],
    mask: Sequence[torch.Tensor] = (),
    source_text: Sequence[str] = (),
    target_text: Sequence[str] = (),
) -> list[EditedPicture]:
    """What lists of IMAGE batches, MASK batches and texts with a line for each picture say about each edited picture.

    One source, mask or text serves all edits, and one edit all sources. Masks are resized to the picture. Raises
    ValueError, naming the socket, if the numbers or the sizes of the pictures differ or a picture is none.
    """
    sources, edits = _pictures(source, "source"), _pictures(edited, "edited")
    for pictures, socket in ((sources, "source"), (edits, "edited")):
        if not pictures:
            raise ValueError(f"{socket}: the list is empty. Connect at least one picture.")
    count = max(len(edits), len(sources))
    columns = (
        _for_each(sources, count, "source", "pictures"),
        _for_each(edits, count, "edited", "pictures"),
        _for_each(_masks(mask) or [None], count, "mask", "masks"),
        _for_each(read_lines(source_text, "source_text") or [""], count, "source_text", "lines"),
        _for_each(read_lines(target_text, "target_text") or [""], count, "target_text", "lines"),
    )
    pictures = [EditedPicture(*row) for row in zip(*columns)]
    for number, picture in enumerate(pictures, 1):
        if picture.source.shape != picture.edited.shape:
            (height, width), (height_edited, width_edited) = picture.source.shape[1:3], picture.edited.shape[1:3]
            raise ValueError(
                f"edited: picture {number} is {width_edited}x{height_edited}, its source {width}x{height}. Resize one of "
                "them (Upscale Image), or give the source as it went into VAE Encode."
            )
    return [replace(p, mask=_resized(p.mask, p.source.shape[1:3])) if p.mask is not None else p for p in pictures]


def _pictures(batches: Sequence[torch.Tensor], socket: str) -> list[torch.Tensor]:
    pictures = []
    for batch in batches:
        check_image(batch, socket)
        pictures += [rgb(picture).cpu() for picture in interruptible(batch.split(1))]
    return pictures


def _masks(batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    masks = []
    for batch in batches:
        if not torch.is_tensor(batch) or batch.ndim not in (2, 3) or not batch.numel() or not batch.isfinite().all():
            raise ValueError(
                f"mask: expected [batch, height, width] of finite values, got {list(getattr(batch, 'shape', ()))}."
            )
        masks += batch.reshape(-1, *batch.shape[-2:]).float().clamp(0, 1).cpu().split(1)
    return masks


def read_lines(texts: Sequence[str], socket: str) -> list[str]:
    """The lines of all texts that are not empty. Raises ValueError, naming `socket`, for what is no text."""
    read = [check_text(text, socket, LONGEST_TEXT) for text in texts]
    return [line.strip() for text in read for line in text.splitlines() if line.strip()]


def _for_each(items: list, count: int, socket: str, words: str) -> list:
    if len(items) not in (1, count):
        raise ValueError(f"{socket}: it brings {len(items)} {words} for {count} pictures. Give one, or one for each.")
    return items * count if len(items) == 1 else items


def _resized(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if mask.shape[1:] == size:
        return mask
    return F.interpolate(mask[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def measure_edits(pictures: list[EditedPicture], judges: Judges) -> list[EditFigures]:
    """The figures of every picture. Can be cancelled between two."""
    progress = comfy.utils.ProgressBar(len(pictures))
    figures = []
    for picture in pictures:
        comfy.model_management.throw_exception_if_processing_interrupted()
        figures.append(measure_edit(picture, judges))
        progress.update(1)
    return figures


def measure_edit(picture: EditedPicture, judges: Judges) -> EditFigures:
    """The figures of one picture.

    For SSIM and LPIPS, which look at neighbourhoods, the source takes the place of the edit inside the mask, so that the
    edit itself does not count.
    """
    source, edited = picture.source.movedim(-1, 1), picture.edited.movedim(-1, 1)
    inside = None if picture.mask is None else picture.mask[:, None]
    outside = None if inside is None else 1 - inside
    kept = edited if inside is None else inside * source + outside * edited
    mse = metrics.mean_squared_error(source, edited, outside)
    values = {"mse": mse, "psnr": metrics.peak_signal_to_noise(mse)}
    if inside is not None:
        values["mse_inside"] = metrics.mean_squared_error(source, edited, inside)
    if min(source.shape[-2:]) >= metrics.WINDOW:
        values["ssim"] = metrics.structural_similarity(source, kept, outside)
    if judges.lpips is not None and (outside is None or outside.any()):
        values["lpips"] = judges.lpips.distance(picture.source, kept.movedim(1, -1))
    if judges.dino is not None:
        keys = (judges.dino.keys(each) for each in (picture.source, picture.edited))
        values["structure_distance"] = metrics.structure_distance(*keys)
    if judges.clip is not None:
        values |= _clip_figures(judges.clip, picture)
    return EditFigures(**{name: float(value) for name, value in values.items()})


def _clip_figures(clip: ClipJudge, picture: EditedPicture) -> dict[str, float]:
    if not picture.target_text:
        return {}
    texts = [text for text in (picture.target_text, picture.source_text) if text]
    similarity = clip.similarity(picture.edited, texts)[0].tolist()
    values = {"clip_similarity": clip_score(similarity[0])}
    if len(texts) == 2:
        # The paper's CLIP-Acc, section 4: the share of edits that fit the target text better than the source text.
        values["clip_accuracy"] = float(similarity[0] > similarity[1])
    if picture.mask is not None and picture.mask.any():
        shown = picture.edited * picture.mask[..., None]
        values["clip_similarity_inside"] = clip_score(float(clip.similarity(shown, texts[:1])))
    return values


def clip_score(similarity: float) -> float:
    """CLIPScore (Hessel et al. 2021) as benchmarks report it: what is no likeness at all is 0, not less."""
    return max(similarity, 0.0)


def mean_figures(figures: list[Figures]) -> Figures:
    """The mean of each figure over the pictures that have it: `figures` are one kind of dataclass of numbers."""
    kind, means = type(figures[0]), {}
    for field in fields(kind):
        known = [value for value in (getattr(each, field.name) for each in figures) if not math.isnan(value)]
        means[field.name] = sum(known) / len(known) if known else math.nan
    return kind(**means)
