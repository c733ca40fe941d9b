"""The edits, and scenes whose edited picture is known."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...demo_model.scene import Scene, sample_scene
from ...demo_model.scene_renders import render
from ...devtools import graphs

# Far from the training seeds, from a million on, and from each other.
TUNING_SEED = 200_000
TEST_SEED = 300_000
MARGIN = 8  # pixels, one cell of the latent: what the decoder spreads of a change that was right


@dataclass(frozen=True)
class QualityEdit:
    """What changes in a scene, how to tell it, and how much of the picture may change.

    `before`, `after`: fields of a Scene; the first of `after` is what the judge is asked. `swap`: what a caption says
    before and after. `concept`: the two concepts of the edit direction, and the strength it wants.
    """

    concept: graphs.Edit
    before: dict
    after: dict
    swap: tuple[str, str]
    whole_picture: bool = False

    @property
    def asked(self) -> tuple[str, object]:
        """The judge's question and the answer that is wanted."""
        return next(iter(self.after.items()))


def _edit(name: str, before: dict, after: dict, swap: tuple[str, str], whole_picture: bool = False) -> QualityEdit:
    return QualityEdit(graphs.EDITS[name], before, after, swap, whole_picture)


EDITS = {
    "cat2dog": _edit("cat2dog", {"subject": "cat"}, {"subject": "dog"}, ("cat", "dog")),
    "horse2zebra": _edit("horse2zebra", {"subject": "horse"}, {"subject": "zebra"}, ("horse", "zebra")),
    "add_glasses": _edit(
        "add_glasses", {"subject": "cat", "glasses": False}, {"glasses": True}, ("cat", "cat wearing glasses")
    ),
    "day2night": _edit("day2night", {"night": False}, {"night": True}, ("during the day", "at night"), True),
    "sketch2pastel": _edit(
        "sketch2pastel",
        {"style": "pencil sketch"},
        {"style": "oil pastel"},
        ("a pencil sketch of", "an oil pastel drawing of"),
        True,
    ),
}


@dataclass(frozen=True)
class Scenes:
    """Source pictures and their ground truth, [B, H, W, 3] in 0..1, and `outside` [B, H, W, 1], 1 where none may change."""

    sources: Tensor
    truths: Tensor
    outside: Tensor
    drawn: list[Scene] = field(repr=False)


def draw_scenes(edit: QualityEdit, count: int, first_seed: int) -> Scenes:
    """`count` scenes before and after an edit. `outside`: all but MARGIN pixels around what differs."""
    before = [sample_scene(first_seed + i, **edit.before) for i in range(count)]
    sources, truths = (_pictures(scenes) for scenes in (before, [replace(scene, **edit.after) for scene in before]))
    differs = (sources != truths).any(dim=-1)[:, None].float()
    grown = F.max_pool2d(differs, 2 * MARGIN + 1, 1, MARGIN)
    return Scenes(sources, truths, 1 - grown.movedim(1, -1), before)


def _pictures(scenes: list[Scene]) -> Tensor:
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).float() / 255
