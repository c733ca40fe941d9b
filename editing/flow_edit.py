"""FlowEdit: edit a picture without inverting it (Kulikov et al., ICCV 2025), with FlowAlign's term (Kim et al., 2025).

Every model is seen as one that goes straight from picture to noise, x = (1 - s) * picture + s * noise, with s in 0..1: the
latent of any `NoisePath`, divided by its `total`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .inputs import interruptible
from .trajectory import NoisePath


class FlowEditPasses(Protocol):
    """What is asked of a model: estimates of the picture from its latents [B, C, H, W] at a noise level, and noise."""

    def source(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """With the source's text."""

    def target(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """With the edit's text."""

    def noise(self) -> torch.Tensor:
        """New noise like the picture."""


@dataclass(frozen=True)
class FlowEditSettings:
    """`samples`: noises that are averaged in each step. `consistency`: weight of FlowAlign's term, 0 without it."""

    samples: int = 1
    consistency: float = 0.01


def flow_edit(
    picture: torch.Tensor,
    levels: Sequence[float],
    path: NoisePath,
    passes: FlowEditPasses,
    settings: FlowEditSettings,
    after_step: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Move a picture along the difference of two velocities (FlowEdit, Algorithm 1): the edited picture [B, C, H, W].

    `levels`: noise levels of the model, descending, the last one 0. `after_step(step, edited, contrast)` gives back the edited
    picture, limited to where it may change; `contrast` [B, 1, H, W] is how far apart the estimates were.
    """
    edited = picture
    for step, (sigma, sigma_next) in enumerate(zip(levels, levels[1:])):
        share, share_next, total = path.share(sigma), path.share(sigma_next), path.total(sigma)
        moved = torch.zeros_like(picture)
        contrast = torch.zeros_like(_over_channels(picture))
        for _ in interruptible(range(settings.samples)):
            noised = torch.lerp(picture, passes.noise(), share)
            shifted = noised + edited - picture
            apart = passes.target(total * shifted, sigma) - passes.source(total * noised, sigma)
            # The velocity at x is (x - estimate) / share.
            velocity = (edited - picture - apart) / share
            moved += (share_next - share) * velocity - settings.consistency * apart
            contrast += _over_channels(apart.abs())
        edited = after_step(step, edited + moved / settings.samples, contrast / settings.samples)
    return edited


def skipped(steps: int, share: float) -> int:
    """How many of so many steps a share of them is, in 0..1; at least one step is left."""
    return min(round(share * steps), steps - 1)


def _over_channels(x: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] of [B, C, H, W] or, with frames, of [B, C, F, H, W]."""
    return x.flatten(1, -3).mean(1, keepdim=True)
