"""The way of a picture up the noise levels, evaluated by a running ComfyUI guider."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...editing import ddim
from ...editing.inversion import direct_residuals, invert, invert_fixed_point, latent_psnr, on_grid, reconstruct
from ...editing.map_store import MapStore
from .. import progress
from .hook_schedule import HookSchedule
from .passes import UNetPasses


class _Estimates:
    """Estimates of the clean picture in the order of the levels; the maps drawn on the trajectory go to `maps`.

    `last`: the last level that is evaluated.
    """

    def __init__(self, passes: UNetPasses, hooks: HookSchedule, maps: MapStore | None, last: int, on_step: Callable):
        self.passes = passes
        self.hooks = hooks
        self.maps = maps
        self.last = last
        self.on_step = on_step
        self.of_steps = []
        self.recorded = None

    def denoise(self, x: torch.Tensor, sigma: float, level: int) -> torch.Tensor:
        """`level`: that of the trajectory which x is on, or 0 if it is on none."""
        self.hooks.go_to(sigma)
        if self.maps is None or level == 0 or not self.maps.will_keep(level, self.last):
            return self.passes.denoise(x, sigma)
        self.recorded = x
        denoised = self.passes.denoise_and_record(x, sigma, partial(self.maps.add, level))
        self.maps.trim()
        return denoised

    def denoise_next(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """The estimate at the latent that the last step led to. The first call sees the clean picture, on no level."""
        return self.denoise(x, sigma, len(self.of_steps))

    def step_done(self, index: int, denoised: torch.Tensor, x: torch.Tensor) -> None:
        self.of_steps.append(denoised)
        self.on_step(index, denoised, x)

    def step_solved(self, index: int, denoised: torch.Tensor, x: torch.Tensor) -> None:
        """The same where the trajectory goes on from x, which need not be the latent that was recorded."""
        if self.recorded is not None and not torch.equal(self.recorded, x):
            self.maps.drop(index + 1)
        self.step_done(index, denoised, x)


def walk_up(
    method: str,
    latent: torch.Tensor,
    sigmas: torch.Tensor,
    transitions: list[ddim.Transition],
    passes: UNetPasses,
    hooks: HookSchedule,
    maps: MapStore | None,
    regularize: Callable[[torch.Tensor], torch.Tensor],
    fixed_point_iterations: int,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(trajectory, residuals) of an `editing.inversion.Inversion`, with the maps drawn on the way kept in `maps`.

    `latent`: the clean picture [B, C, H, W], in the model's space. `sigmas`: [N+1] ascending from 0. `transitions`: the
    steps, but for the method "fixed-point", which goes from each level to the next.
    """
    estimates = _Estimates(passes, hooks, maps, len(sigmas) - (2 if method == "ddim" else 1), on_step)
    if method == "fixed-point":
        visited = invert_fixed_point(
            latent, sigmas, estimates.denoise, regularize, fixed_point_iterations, estimates.step_solved
        )
        trajectory = torch.stack([x.cpu() for x in visited])
        return trajectory, direct_residuals(trajectory, sigmas, lambda level: estimates.of_steps[level - 1])
    visited = invert(latent, transitions, estimates.denoise_next, regularize, estimates.step_done)
    trajectory = on_grid(visited, transitions, latent, sigmas)
    if method != "direct":
        return trajectory, None
    # The walk up has visited every level but the last one with just this estimate.
    estimates.of_steps.append(estimates.denoise_next(visited[-1], float(sigmas[-1])))
    return trajectory, direct_residuals(trajectory, sigmas, estimates.of_steps.__getitem__)


def plain_psnr(trajectory: torch.Tensor, sigmas: torch.Tensor, passes: UNetPasses, hooks: HookSchedule) -> torch.Tensor:
    """How well plain DDIM redraws the pictures from the end of their trajectory, see `latent_psnr`: [B].

    It takes N UNet calls. `passes`: with the source text as the positive, and no guidance.
    """
    steps, done = len(sigmas) - 1, 0

    def denoise(x, sigma):
        nonlocal done
        done += 1
        progress.show(f"Redrawing {done}/{steps}")
        hooks.go_to(sigma)
        return passes.denoise(x, sigma)

    return latent_psnr(reconstruct(trajectory[-1].to(sigmas.device), sigmas, denoise).cpu(), trajectory[0])
