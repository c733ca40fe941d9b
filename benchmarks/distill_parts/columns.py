"""The columns of the benchmark: each way of making an edit, measured on the same scenes in the same run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...demo_model.training.teacher import Teacher
from ...host.networks.students import load_student
from ..cost_parts.counting import flop_counter
from ..judge import Judge
from ..quality_parts.scenes import QualityEdit, Scenes
from .figures import apply, errors, milliseconds

TEACHER, FEW, STUDENT, SOURCE = "teacher", "teacher, few steps", "student", "source unchanged"
MOVED = "teacher, moved"  # its edit of the scene moved sideways by a latent, moved back: how much it varies itself
LATENT = 8  # pixels
BATCH = 8  # pictures that the teacher edits at once for the figures; time is taken of one
TIMED = 3  # runs, of which the fastest counts
ROWS = {
    "hit": ("hit rate (judge)", 2),
    "whole": ("error to the teacher, whole", 2),
    "inside": ("error to the teacher, inside", 2),
    "truth_whole": ("error to the truth, whole", 2),
    "truth_inside": ("error to the truth, inside", 2),
    "background": ("background error", 2),
    "seconds": ("CPU seconds a picture, one thread", 4),
    "gmac": ("operations, GMAC", 2),
    "megabytes": ("file, MB", 2),
}


@dataclass(frozen=True)
class Column:
    """A way of making the edit. `figures`: by the names of ROWS, those that it has."""

    name: str
    figures: dict[str, float]


def measure(
    edit: QualityEdit, scenes: Scenes, judge: Judge, file: Path, steps: tuple[int, int], say: Callable[[str], None]
) -> tuple[list[Column], dict[str, Tensor]]:
    """All columns, and the pictures [B, H, W, 3] of those that edit. `steps`: of the teacher and of the fast teacher."""
    pictures, costs = {}, {}
    moved = scenes.sources.roll(LATENT, 2)
    for name, count, sources in (
        (TEACHER, steps[0], scenes.sources),
        (MOVED, steps[0], moved),
        (FEW, steps[1], scenes.sources),
    ):
        teacher = Teacher(edit, count)
        drawn = []
        for first in range(0, len(sources), BATCH):
            drawn.append(teacher.draw(sources[first : first + BATCH])[0].float())
            say(f"{name}, {count} steps: {min(first + BATCH, len(sources))} of {len(sources)} scenes")
        pictures[name] = torch.cat(drawn)
        if name == MOVED:
            pictures[name] = pictures[name].roll(-LATENT, 2)
        else:
            costs[name] = cost(lambda picture: teacher.draw(picture), sources[:1])  # noqa: B023
    student = load_student(file)
    pictures[STUDENT] = apply(student, scenes.sources)
    costs[STUDENT] = cost(lambda picture: apply(student, picture), scenes.sources[:1])
    costs[STUDENT]["seconds"] = milliseconds(student, scenes.sources.shape[1])["cpu"] / 1000
    costs[STUDENT]["megabytes"] = file.stat().st_size / 1e6
    columns = [
        Column(name, errors(edit, scenes, pictures[TEACHER], made, judge) | costs.get(name, {}))
        for name, made in {**pictures, SOURCE: scenes.sources}.items()
    ]
    return columns, pictures


def cost(run: Callable[[Tensor], object], picture: Tensor) -> dict[str, float]:
    """CPU seconds, and operations in billions of multiplications with addition, of a call that is warm."""
    run(picture)
    spent = []
    for _ in range(TIMED):
        begin = time.process_time()
        run(picture)
        spent.append(time.process_time() - begin)
    with flop_counter() as counter:
        run(picture)
    return {"seconds": min(spent), "gmac": counter.get_total_flops() / 2e9}


def table(columns: list[Column]) -> str:
    """A line for each figure, and how many times the student is cheaper than the teacher."""
    rows = [
        (label, *(f"{column.figures[key]:.{digits}f}" if key in column.figures else "" for column in columns))
        for key, (label, digits) in ROWS.items()
        if any(key in column.figures for column in columns)
    ]
    figures = {column.name: column.figures for column in columns}
    rows.append(("times the student's seconds", *(_times(column, figures[STUDENT], "seconds") for column in columns)))
    rows.append(("times the student's operations", *(_times(column, figures[STUDENT], "gmac") for column in columns)))
    head = ("", *(column.name for column in columns))
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in (head, *rows)
    )


def _times(column: Column, student: dict[str, float], key: str) -> str:
    return f"{column.figures[key] / student[key]:.0f}" if key in column.figures else ""
