"""What each part of a student's training is good for: short trainings that differ from the first in one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...demo_model.loader import load_demo_model
from ...distillation.learning import Settings, Training
from ...distillation.losses import LossWeights
from ...distillation.pairs import PairFolder
from ...host.networks.students import make_student
from ...host.networks.teacher_features import EncoderFeatures
from ..judge import Judge
from ..quality_parts.scenes import QualityEdit, Scenes
from .figures import apply, errors

BATCH = 6
FIGURES = {"hit": 2, "inside": 2, "truth_inside": 2, "background": 2, "detail": 2}


@dataclass(frozen=True)
class Variant:
    """A training; the first one is that of the students that ship. `pairs`: at most so many."""

    name: str
    pairs: int = 1000
    slopes: float = LossWeights.slopes
    features: float = 0.0
    sharpness: float = 0.0
    mirror: bool = False


VARIANTS = (
    Variant("1000 pairs"),
    Variant("300 pairs", pairs=300),
    Variant("100 pairs", pairs=100),
    Variant("without the slope loss", slopes=0.0),
    Variant("with the feature loss", features=LossWeights.features),
    Variant("sharpness 0.2", sharpness=0.2),
    Variant("sharpness 0.5", sharpness=0.5),
    Variant("pairs also mirrored", mirror=True),
)


def detail(pictures: Tensor, teacher: Tensor) -> float:
    """How strong differences of neighbouring pixels are beside the teacher's, [B, H, W, 3]: below 1 is blurred."""

    def strength(x: Tensor) -> Tensor:
        return (x[:, 1:] - x[:, :-1]).abs().mean() + (x[:, :, 1:] - x[:, :, :-1]).abs().mean()

    return float(strength(pictures) / strength(teacher))


@dataclass(frozen=True)
class Budget:
    """What each training has: steps of BATCH whole pictures. `half`: in mixed precision."""

    steps: int
    half: bool = False


def train(variant: Variant, folder: Path, budget: Budget, seed: int = 0) -> torch.nn.Module:
    """The student of a variant. `folder`: pairs of `dev.py train distilled`."""
    pairs = PairFolder(folder)
    weights = LossWeights(slopes=variant.slopes, features=variant.features)
    chosen = {"steps": budget.steps, "batch": BATCH, "half": budget.half}
    chosen |= {"sharpness": variant.sharpness, "mirror": variant.mirror}
    settings = Settings(**chosen, seed=seed, weights=weights)
    with torch.inference_mode(False), torch.enable_grad():
        features = EncoderFeatures(load_demo_model()[2], "cpu") if variant.features else None
        student = make_student(seed=seed).to(memory_format=torch.channels_last)
        return Training(student, pairs.read(pairs.keys()[: variant.pairs]), settings, features).run()


def ablate(
    edit: QualityEdit, scenes: Scenes, judge: Judge, work: Path, budget: Budget, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """The figures of all variants. `work`: WORK/EDIT of `dev.py train distilled`, with pairs and tests of these scenes."""
    tests = PairFolder(work / "tests")
    teacher = tests.read([str(scene) for scene in scenes_keys(tests, len(scenes.sources))]).edited
    teacher = teacher.movedim(1, -1).float() / 255
    found = {}
    for variant in VARIANTS:
        pictures = apply(train(variant, work / "pairs", budget), scenes.sources)
        found[variant.name] = errors(edit, scenes, teacher, pictures, judge) | {"detail": detail(pictures, teacher)}
        say(f"{variant.name}: inside {found[variant.name]['inside']:.2f}")
    return found


def scenes_keys(tests: PairFolder, count: int) -> list[int]:
    """The seeds of the first test scenes. Raises ValueError if the folder has fewer."""
    keys = sorted(map(int, tests.keys()))[:count]
    if len(keys) < count:
        raise ValueError(
            f"{tests.folder} has {len(keys)} of {count} test scenes. Draw them with: dev.py train distilled"
        )
    return keys


def ablation_table(found: dict[str, dict[str, float]]) -> str:
    """A row for each variant."""
    names = [name for name in FIGURES if any(name in figures for figures in found.values())]
    rows = [("", *names)]
    for variant, figures in found.items():
        rows.append((variant, *(f"{figures[name]:.{FIGURES[name]}f}" if name in figures else "" for name in names)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows
    )
