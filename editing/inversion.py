"""Inversion: an image's latent walked up the DDIM grid to noise, with every latent on the way kept."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType

import torch

from . import ddim
from .map_store import MapStore


@dataclass(frozen=True, eq=False)
class Inversion(list):
    """A source picture on the sampler's grid: what the P2PZ_INVERSION socket carries.

    `trajectory`: [N+1, B, C, H, W] fp32 latents in the model's space, `trajectory[0]` the clean picture and
    `trajectory[i]` its latent at `sigmas[i]`. `sigmas`: [N+1] ascending from 0. `source`: the conditioning that
    describes the picture. `model`: the model it was made with. `noise_mask`: [.., H, W] in 0..1, where the picture may
    change. `residuals`: [N, B, C, H, W], what `direct_residuals` gives, or None to sample by plain DDIM. `maps`: the
    source's cross-attention maps, as far as they were kept, keyed by (entry of `source`, attention site).
    `reconstruction_psnr`: [B], how well plain DDIM redraws the picture, see `latent_psnr`, or None if that was not tried.

    As a list it is that of the tensors it holds: ComfyUI's cache counts those that it finds in lists, and nothing else.
    """

    trajectory: torch.Tensor
    sigmas: torch.Tensor
    source: list
    model: ReferenceType
    noise_mask: torch.Tensor | None = None
    residuals: torch.Tensor | None = None
    maps: MapStore | None = None
    reconstruction_psnr: torch.Tensor | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        held = (self.trajectory, self.sigmas, self.noise_mask, self.residuals, self.reconstruction_psnr)
        yield from (tensor for tensor in held if tensor is not None)
        yield from () if self.maps is None else self.maps.tensors

    def __len__(self) -> int:
        return sum(1 for _ in self)

    # Two inversions are the same only where they are one, as anything that holds tensors.
    __eq__, __ne__ = object.__eq__, object.__ne__
    __hash__ = object.__hash__

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def batch(self) -> int:
        """Number of pictures."""
        return self.trajectory.shape[1]


def invert(
    latent: torch.Tensor,
    transitions: list[ddim.Transition],
    denoise: Callable[[torch.Tensor, float], torch.Tensor],
    regularize: Callable[[torch.Tensor], torch.Tensor],
    on_step: Callable[[int, torch.Tensor, torch.Tensor], Any],
) -> list[torch.Tensor]:
    """Deterministic DDIM inversion with regularized noise maps (pix2pix-zero eq. 1 and 3).

    `latent`: clean latent [B, C, H, W]. `denoise(x, sigma)`: the model's estimate of the clean latent.
    `on_step(index, denoised, x)` is called after every step. Returns the latent at the start and after each transition.
    """
    x = ddim.rescale(latent, 0.0, transitions[0].sigma_from)
    visited = [x]
    for index, (sigma_from, sigma_model, sigma_to) in enumerate(transitions):
        seen = ddim.rescale(x, sigma_from, sigma_model)
        denoised = denoise(seen, sigma_model)
        eps = regularize(ddim.predicted_eps(seen, denoised, sigma_model))
        x = ddim.step(x, eps, sigma_from, sigma_to)
        visited.append(x)
        on_step(index, denoised, x)
    return visited


def invert_fixed_point(
    latent: torch.Tensor,
    sigmas: torch.Tensor,
    denoise: Callable[[torch.Tensor, float, int], torch.Tensor],
    regularize: Callable[[torch.Tensor], torch.Tensor],
    iterations: int,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], Any],
) -> list[torch.Tensor]:
    """Inversion whose every step the sampler's step undoes (Pan et al. 2023, AIDI; Garibi et al. 2024, ReNoise).

    DDIM steps down along the noise predicted at the noisier latent, which `invert` has not reached yet: it steps up along
    that of the cleaner one. Here x_i solves the equation of the step down, in sigma space

        x_i = x_{i-1} + (sigma_i - sigma_{i-1}) eps(x_i, sigma_i),

    by `iterations` substitutions into its right-hand side, starting along the regularized `expected_eps`. A picture that a
    substitution takes further from solving it stays at the best latent. Without iterations it takes no more evaluations
    than `invert`.

    `latent`: clean latent [B, C, H, W]. `sigmas`: [N+1] ascending from 0. `denoise(x, sigma, level)`: the model's
    estimate of the clean latent; `level` counts those of the trajectory where x is to stay on it, and is 0 elsewhere.
    `on_step(index, denoised, x)` is called after every step, with the estimate at x, the latent it leads to. Returns the
    N+1 latents.
    """
    levels = sigmas.tolist()
    seen = ddim.rescale(latent, 0.0, levels[1])
    eps = ddim.predicted_eps(seen, denoise(seen, levels[1], 0), levels[1])
    visited, found = [latent], []
    for index, (sigma_from, sigma) in enumerate(zip(levels, levels[1:])):
        before, level = visited[-1], index + 1

        def evaluate(x, left):
            denoised = denoise(x, sigma, 0 if left else level)
            return x, denoised, ddim.step(before, ddim.predicted_eps(x, denoised, sigma), sigma_from, sigma)

        if found:
            eps = expected_eps(found[-2:], sigma)
        best = evaluate(ddim.step(before, regularize(eps), sigma_from, sigma), iterations)
        closer = torch.ones_like(before[:, :1, :1, :1], dtype=torch.bool)
        for left in reversed(range(iterations)):
            x, _, substituted = best
            trial = evaluate(torch.where(closer, substituted, x), left)
            closer = closer & (_unsolved(*trial) < _unsolved(*best))
            best = tuple(torch.where(closer, new, old) for new, old in zip(trial, best))
            if not closer.any():
                break
        x, denoised, _ = best
        visited.append(x)
        found = [*found[-1:], (sigma, ddim.predicted_eps(x, denoised, sigma))]
        on_step(index, denoised, x)
    return visited


def expected_eps(found: list[tuple[float, torch.Tensor]], sigma: float) -> torch.Tensor:
    """The noise to expect at the next level: that of the last one, or on a line through the last two (sigma, eps).

    The line is drawn over atan(sigma), the angle between picture and noise in a variance-preserving latent (Salimans and
    Ho 2022, appendix D), along which they turn evenly.
    """
    if len(found) == 1:
        return found[0][1]
    (sigma_a, eps_a), (sigma_b, eps_b) = found
    ahead = (math.atan(sigma) - math.atan(sigma_b)) / (math.atan(sigma_b) - math.atan(sigma_a))
    return torch.lerp(eps_a, eps_b, 1 + ahead)


def _unsolved(x: torch.Tensor, denoised: torch.Tensor, substituted: torch.Tensor) -> torch.Tensor:
    """How far a latent is from solving the equation of the step down, per picture: [B, 1, 1, 1]."""
    return (substituted - x).square().sum((1, 2, 3), keepdim=True)


def on_grid(
    visited: list[torch.Tensor], transitions: list[ddim.Transition], latent: torch.Tensor, sigmas: torch.Tensor
) -> torch.Tensor:
    """The visited latents as a trajectory on the sampler's grid: [N+1, B, C, H, W] on the CPU.

    Each latent is written at the grid level it stands for, counted from the noisiest; where the inversion skipped the
    first levels, and at level 0, stands the clean `latent`.
    """
    levels = [transitions[0].sigma_from, *(transition.sigma_to for transition in transitions)]
    grid = sigmas.tolist()
    offset = len(grid) - len(levels)
    clean = [ddim.rescale(latent, 0.0, sigma) for sigma in grid[: max(offset, 1)]]
    kept = [
        ddim.rescale(x, level, sigma)
        for x, level, sigma in zip(visited[len(clean) - offset :], levels[len(clean) - offset :], grid[len(clean) :])
    ]
    return torch.stack([x.cpu() for x in clean + kept])


def reconstruct(
    noise: torch.Tensor, sigmas: torch.Tensor, denoise: Callable[[torch.Tensor, float], torch.Tensor]
) -> torch.Tensor:
    """Plain DDIM from `noise` [B, C, H, W], the last latent of a trajectory, down to the clean picture.

    `sigmas`: [N+1] ascending from 0. `denoise(x, sigma)`: the model's estimate of the clean latent for the source text.
    """
    x, levels = noise, sigmas.tolist()[::-1]
    for sigma, sigma_to in zip(levels, levels[1:]):
        x = ddim.step(x, ddim.predicted_eps(x, denoise(x, sigma), sigma), sigma, sigma_to)
    return x


def latent_psnr(latent: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of latents [B, C, H, W] to clean ones, whose own range of values is the peak: [B]."""
    dims = (1, 2, 3)
    squared_error = (latent - clean).square().mean(dims).clamp_min(torch.finfo(clean.dtype).tiny)
    return 20 * (clean.amax(dims) - clean.amin(dims)).log10() - 10 * squared_error.log10()


def direct_residuals(
    trajectory: torch.Tensor, sigmas: torch.Tensor, denoised: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """What each DDIM step down from the trajectory misses the trajectory by: [N, B, C, H, W] on the CPU.

    Added after each sampling step, it makes the unedited picture come out exactly (PnP Inversion, Ju et al. 2024,
    Algorithm 1, where it is the source branch that is corrected). `residuals[i - 1]` belongs to the step from level i
    to i - 1. `denoised(i)`: the model's estimate at `trajectory[i]`, `sigmas[i]`, for the source text.
    """
    levels = sigmas.tolist()
    residuals = []
    for i in range(1, len(levels)):
        estimate = denoised(i)
        x = trajectory[i].to(estimate)
        stepped = ddim.step(x, ddim.predicted_eps(x, estimate, levels[i]), levels[i], levels[i - 1])
        residuals.append(trajectory[i - 1] - stepped.cpu())
    return torch.stack(residuals)
