"""The figures of edits, written down for people."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields

from .edit_figures import EditedPicture, EditFigures, Judges, mean_figures, read_lines

COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "psnr": ("PSNR", "{:.2f} dB".format),
    "ssim": ("SSIM", "{:.4f}".format),
    "mse": ("MSE", "{:.6f}".format),
    "mse_inside": ("MSE inside", "{:.6f}".format),
    "lpips": ("LPIPS", "{:.4f}".format),
    "structure_distance": ("structure distance", "{:.5f}".format),
    "clip_similarity": ("CLIP similarity", "{:.2f}".format),
    "clip_similarity_inside": ("CLIP similarity inside", "{:.2f}".format),
    "clip_accuracy": ("CLIP accuracy", "{:.2f}".format),
}


def write_report(
    figures: list[EditFigures], pictures: list[EditedPicture], judges: Judges, labels: Sequence[str] = ()
) -> str:
    """The mean figures, a line for each picture if there are several, and what was not measured and why.

    `labels`: what the pictures are called, a text with a line for each or a text for each. Raises ValueError for another
    number of them.
    """
    names = read_lines(labels, "labels") or [f"Picture {number}" for number in range(1, len(figures) + 1)]
    if len(names) != len(figures):
        raise ValueError(f"labels: it brings {len(names)} lines for {len(figures)} pictures. Give one for each.")
    masked = any(picture.mask is not None for picture in pictures)
    where = "outside the mask" if masked else "over the whole picture"
    lines = [f"{len(figures)} picture{'s' if len(figures) > 1 else ''}. PSNR, SSIM, MSE and LPIPS {where}."]
    lines.append(f"Mean: {_line(mean_figures(figures))}")
    if len(figures) > 1:
        lines += [f"{name}: {_line(each)}" for name, each in zip(names, figures)]
    return "\n".join([*lines, *(f"Not measured: {reason}" for reason in _missing(figures, pictures, judges))])


def _line(figures: EditFigures) -> str:
    known = ((*COLUMNS[field.name], getattr(figures, field.name)) for field in fields(EditFigures))
    return ", ".join(f"{title} {write(value)}" for title, write, value in known if not math.isnan(value))


def _missing(figures: list[EditFigures], pictures: list[EditedPicture], judges: Judges) -> list[str]:
    reasons = []
    if any(math.isnan(each.mse) for each in figures):
        reasons.append("what lies outside the mask, where a mask covers the whole picture.")
    if any(math.isnan(each.ssim) and not math.isnan(each.mse) for each in figures):
        reasons.append("SSIM of pictures under 11 by 11 pixels, or with too narrow a rim outside the mask.")
    if judges.lpips is None:
        reasons.append("LPIPS, no lpips_model is chosen.")
    if judges.dino is None:
        reasons.append("structure distance, no dino_model is chosen.")
    if judges.clip is None:
        reasons.append("CLIP similarity and accuracy, no clip_model is chosen.")
    elif not all(picture.target_text for picture in pictures):
        reasons.append("CLIP similarity and accuracy, target_text is empty.")
    elif not all(picture.source_text for picture in pictures):
        reasons.append("CLIP accuracy, source_text is empty.")
    return reasons
