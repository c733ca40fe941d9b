"""The figures of PIE-Bench, as its authors compute them (Ju et al., ICLR 2024, section 4.2, and their published code).

They differ from those of the node Edit Metrics: the edited area is black in both pictures instead of left out, so its pixels
count as equal ones; SSIM counts the windows beyond the edges on mirrored pixels; and the structure distance feeds DINO
pixels in 0..255 that are normalized as if they were in 0..1. The last gives other figures than the pix2pix-zero paper's and
is no matter of scale, so it can be chosen: `structure_range` 255 for the benchmark's table, 1 for the papers'.
"""

import math
from dataclasses import dataclass

import torch
from pix2pix_zero.editing import metrics
from pix2pix_zero.host.networks.edit_figures import Judges, clip_score


@dataclass(frozen=True)
class PieFigures:
    """The table's columns for one picture or the mean of many, unscaled; NaN where one was not measured."""

    structure: float = math.nan
    psnr: float = math.nan
    lpips: float = math.nan
    mse: float = math.nan
    ssim: float = math.nan
    clip_whole: float = math.nan
    clip_edited: float = math.nan


TITLES = {
    "structure": ("struct x1e3", 1e3),
    "psnr": ("PSNR", 1),
    "lpips": ("LPIPS x1e3", 1e3),
    "mse": ("MSE x1e4", 1e4),
    "ssim": ("SSIM x1e2", 1e2),
    "clip_whole": ("CLIP whole", 1),
    "clip_edited": ("CLIP edited", 1),
}

PUBLISHED = {
    "DDIM + Prompt-to-Prompt": (69.43, 17.87, 208.80, 219.88, 71.14, 25.01, 22.44),
    "Direct + Prompt-to-Prompt": (11.65, 27.22, 54.55, 32.86, 84.76, 25.02, 22.10),
    "DDIM + pix2pix-zero": (61.68, 20.44, 172.22, 144.12, 74.67, 22.80, 20.54),
    "Direct + pix2pix-zero": (49.22, 21.53, 138.98, 127.32, 77.05, 23.31, 21.05),
    "DDIM + Plug-and-Play": (28.22, 22.28, 113.46, 83.64, 79.05, 25.41, 22.55),
    "Direct + Plug-and-Play": (24.29, 22.46, 106.06, 80.45, 79.68, 25.41, 22.62),
}
"""Rows of the authors' own table (all 700 edits, SD 1.4, 50 steps), in the columns and scales of `TITLES`."""


def pie_figures(
    source: torch.Tensor,
    edited: torch.Tensor,
    mask: torch.Tensor,
    target_text: str,
    judges: Judges,
    structure_range: float = 255.0,
) -> PieFigures:
    """Judge one edit: pictures [1, H, W, 3] in 0..1, mask [1, H, W] of what was to change."""
    values = {}
    if judges.dino is not None:
        keys = (judges.dino.keys(picture, structure_range) for picture in (source, edited))
        values["structure"] = metrics.structure_distance(*keys)
    if judges.clip is not None:
        shown = edited * mask[..., None]
        whole, inside = (float(judges.clip.similarity(picture, [target_text])) for picture in (edited, shown))
        values |= {"clip_whole": clip_score(whole), "clip_edited": clip_score(inside)}
    if not mask.all():
        black = [picture * (1 - mask[..., None]) for picture in (source, edited)]
        a, b = (picture.movedim(-1, 1) for picture in black)
        values["mse"] = metrics.mean_squared_error(a, b)
        values["psnr"] = metrics.peak_signal_to_noise(values["mse"])
        values["ssim"] = metrics.structural_similarity(a, b, reflect=True)
        if judges.lpips is not None:
            values["lpips"] = judges.lpips.distance(*black)
    return PieFigures(**{name: float(value) for name, value in values.items()})


def table(rows: dict[str, PieFigures]) -> str:
    """The rows under the benchmark's headings and scales, then those its authors published."""
    width = max(map(len, (*rows, *PUBLISHED))) + 2
    lines = [" " * width + "".join(f"{title:>13}" for title, _ in TITLES.values())]
    for name, figures in rows.items():
        lines.append(_row(name, width, [getattr(figures, column) * scale for column, (_, scale) in TITLES.items()]))
    lines.append("published by the benchmark's authors:")
    return "\n".join([*lines, *(_row(name, width, values) for name, values in PUBLISHED.items())])


def _row(name: str, width: int, values) -> str:
    return f"{name:{width}}" + "".join(f"{'-' if math.isnan(value) else format(value, '.2f'):>13}" for value in values)
