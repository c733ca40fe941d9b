"""What a user sees of a student: a preview while it trains, a strip of held-out pairs, a report."""

from typing import TYPE_CHECKING

import torch
from PIL import Image

from ...distillation.learning import Training
from ...pictures.charts import as_pillow
from ...pictures.strips import picture_strip
from .pair_sets import FEW

if TYPE_CHECKING:
    from .run import Wish

ROWS = 4
PREVIEW_SIDE = 512  # pixels, of the longer side
RED = (0.85, 0.1, 0.1)


@torch.no_grad()
def triple(run: Training, index: int) -> list[torch.Tensor]:
    """(source, edited, the student's picture) of a held-out pair, IMAGEs [1, H, W, 3] on the CPU."""
    source, edited, _ = run.held_out.take([index])
    pictures = (source, edited, run.average(source.to(run.device)).clamp(0, 1))
    return [picture.movedim(1, -1).float().cpu() for picture in pictures]


def preview(run: Training) -> tuple[str, Image.Image, int]:
    """Source, edit and student of the first held-out pair, as the host's progress bar takes it."""
    return "JPEG", as_pillow(torch.cat(triple(run, 0), 2)[0]), PREVIEW_SIDE


def held_out_strip(run: Training, errors: list[float]) -> torch.Tensor:
    """A row for some held-out pairs, the worst first and framed, the others evenly from worse to better: [1, H, W, 3]."""
    order = sorted(range(len(errors)), key=lambda index: -errors[index])
    rows = min(ROWS, len(order))
    chosen = [order[round(place * (len(order) - 1) / max(1, rows - 1))] for place in range(rows)]
    pictures, labels = [], []
    for number, index in enumerate(chosen):
        source, edited, student = triple(run, index)
        pictures += [source, edited, student if number else framed(student)]
        labels += ["source", "edited", f"student, error {errors[index]:.1f}" + ("" if number else ": worst")]
    return picture_strip(pictures, labels, 3)


def framed(picture: torch.Tensor) -> torch.Tensor:
    """A picture [1, H, W, 3] with a red frame."""
    width = max(2, min(picture.shape[1:3]) // 48)
    marked = picture.new_tensor(RED).expand_as(picture).clone()
    marked[:, width:-width, width:-width] = picture[:, width:-width, width:-width]
    return marked


def write_report(wish: "Wish", run: Training, errors: list[float]) -> str:
    """What was trained on what, and how near it comes to edits that it has not seen."""
    pairs = len(run.pairs) + len(run.held_out)
    height, width = run.pairs.sources.shape[-2:]
    unchanged = _unchanged(run)
    worst = run.held_out.keys[max(range(len(errors)), key=errors.__getitem__)]
    lines = [
        f"{wish.name}: error inside the edited area {sum(errors) / len(errors):.1f} of 255 on {len(errors)} pairs that it was "
        f"not trained on (source unchanged: {unchanged:.1f}).",
        f"Worst {max(errors):.1f}, best {min(errors):.1f}. The worst pair: {worst}",
        f"{len(run.pairs)} pairs of {width}x{height} were trained on, {run.step} steps of {wish.settings.batch}, "
        f"{run.seconds:.0f} s.",
    ]
    if pairs < FEW:
        lines.insert(1, f"Warning: {pairs} pairs are few. {FEW} and more give a better student.")
    return "\n".join(lines)


@torch.no_grad()
def _unchanged(run: Training) -> float:
    """The mean error of the sources themselves, as `Training.held_out_errors` measures."""
    errors = []
    for index in range(len(run.held_out)):
        source, edited, area = run.held_out.take([index])
        error = ((source - edited).abs().mean(1, keepdim=True) * area).sum() / area.sum().clamp_min(1e-6)
        errors.append(255 * float(error))
    return sum(errors) / len(errors)
