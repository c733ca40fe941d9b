"""The edits once more, pasted back into the pictures that they were made of, against the renders' own pixels."""

import torch
from torch import Tensor

from ...pictures.paste import edit_share, paste_edit
from ..judge import Judge
from .workbench import Workbench


def measure_pasted(bench: Workbench, judge: Judge, pictures: Tensor) -> dict[str, Tensor]:
    """Figures of edited pictures [B, H, W, 3] after Paste Edit with its defaults, each [B].

    The area is the method's own, where it tells one, and always no more than where the picture changed. whole: mean absolute
    error to the rendered ground truth, 0..255, not pasted and pasted. outside: the largest difference to the source
    outside the area, 0..255. kept: the part of the picture that lies outside. hit: 1 where the judge sees the edit.
    """
    question, wanted = bench.edit.asked
    area = None if bench.area is None else bench.area.float().to(pictures)
    pasted = paste_edit(bench.scenes.sources, pictures, area)
    share = edit_share(bench.scenes.sources, pictures, area)[..., None]
    errors = {
        name: 255 * (each - bench.scenes.truths).abs().mean((1, 2, 3))
        for name, each in (("whole_before", pictures), ("whole", pasted))
    }
    return {
        "hit": torch.tensor([float(answer == wanted) for answer in judge.answers(pasted)[question]]),
        **errors,
        "outside": 255 * ((pasted - bench.scenes.sources).abs() * (share == 0)).amax((1, 2, 3)),
        "kept": (share == 0).float().mean((1, 2, 3)),
    }
