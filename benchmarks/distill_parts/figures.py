"""What is measured of a student beside its teacher."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..judge import Judge
from ..quality_parts.scenes import QualityEdit, Scenes

TIMED = 9  # runs, of which the median is taken


@dataclass(frozen=True)
class Compared:
    """Pictures [B, H, W, 3] in 0..1: the teacher's edits as the pairs hold them, and the student's."""

    teacher: Tensor
    student: Tensor


@torch.inference_mode()
def apply(student: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    """What a student makes of pictures [B, H, W, 3] in 0..1, one at a time as the stock node does it: the same shape."""
    rows = [student(picture.movedim(-1, 1)).clamp(0, 1).movedim(1, -1) for picture in pictures.split(1)]
    return torch.cat(rows)


def agreement(edit: QualityEdit, scenes: Scenes, compared: Compared, judge: Judge) -> dict[str, float]:
    """Means over the scenes.

    hit, teacher_hit: where the judge sees the edit. whole, inside: mean absolute error to the teacher, 0..255, of the whole
    picture and of where the ground truth differs from the source. truth_inside, teacher_truth_inside: to the ground truth.
    background, teacher_background: to the source elsewhere. Where the whole picture is edited, inside is the whole.
    """
    question, wanted = edit.asked
    inside = torch.ones_like(scenes.outside) if edit.whole_picture else 1 - scenes.outside

    def hit(pictures: Tensor) -> float:
        return float(np.mean([answer == wanted for answer in judge.answers(pictures)[question]]))

    teacher, student = compared.teacher, compared.student
    figures = {
        "hit": hit(student),
        "teacher_hit": hit(teacher),
        "whole": _error(student, teacher, torch.ones_like(inside)),
        "inside": _error(student, teacher, inside),
        "source_inside": _error(scenes.sources, teacher, inside),
        "truth_inside": _error(student, scenes.truths, inside),
        "teacher_truth_inside": _error(teacher, scenes.truths, inside),
    }
    if not edit.whole_picture:
        figures["background"] = _error(student, scenes.sources, scenes.outside)
        figures["teacher_background"] = _error(teacher, scenes.sources, scenes.outside)
    return figures


def errors(edit: QualityEdit, scenes: Scenes, teacher: Tensor, pictures: Tensor, judge: Judge) -> dict[str, float]:
    """Means over the scenes of pictures [B, H, W, 3] in 0..1, however they were made; errors in 0..255.

    hit: where the judge sees the edit. whole, inside: to the teacher's pictures. truth_whole, truth_inside: to the ground truth.
    background: to the source where nothing may change; left out where the whole picture is edited.
    """
    question, wanted = edit.asked
    everywhere = torch.ones_like(scenes.outside)
    inside = everywhere if edit.whole_picture else 1 - scenes.outside
    figures = {"hit": float(np.mean([answer == wanted for answer in judge.answers(pictures)[question]]))}
    for name, other in (("", teacher), ("truth_", scenes.truths)):
        figures[f"{name}whole"] = _error(pictures, other, everywhere)
        figures[f"{name}inside"] = _error(pictures, other, inside)
    if not edit.whole_picture:
        figures["background"] = _error(pictures, scenes.sources, scenes.outside)
    return figures


def _error(a: Tensor, b: Tensor, where: Tensor) -> float:
    return float(255 * ((a - b).abs() * where).sum() / (3 * where.sum()).clamp_min(1))


@torch.inference_mode()
def milliseconds(student, size: int = 128) -> dict[str, float]:
    """X `cuda`, between CUDA events, where there is such a device."""
    threads, picture = torch.get_num_threads(), torch.rand(1, 3, size, size)
    student.to(torch.device("cpu"))
    try:
        torch.set_num_threads(1)
        student(picture)
        spent = []
        for _ in range(TIMED):
            start = time.process_time()
            student(picture)
            spent.append(1000 * (time.process_time() - start))
    finally:
        torch.set_num_threads(threads)
    found = {"cpu": median(spent)}
    if torch.cuda.is_available():
        found["cuda"] = _on_cuda(student.to(torch.device("cuda")), picture.cuda())
        student.to(torch.device("cpu"))
    return found


def _on_cuda(student: Callable[[Tensor], Tensor], picture: Tensor) -> float:
    for _ in range(5):
        student(picture)
    spent = []
    for _ in range(TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        student(picture)
        end.record()
        torch.cuda.synchronize()
        spent.append(start.elapsed_time(end))
    return median(spent)


def contact_sheet(rows: list[Tensor], columns: int = 8) -> Image.Image:
    """Bands of pictures [B, H, W, 3]: in each, one row for each of `rows`, `columns` wide."""
    count = len(rows[0])
    bands = []
    for start in range(0, count - count % columns or count, columns):
        bands += [torch.cat(list(row[start : start + columns]), 1) for row in rows]
        bands.append(torch.ones(8, *bands[-1].shape[1:]))
    return Image.fromarray((torch.cat(bands[:-1]).clamp(0, 1) * 255).round().byte().numpy())
