"""Inversion: an image's latent walked up the DDIM grid to noise, with every latent and estimate on the way kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .trajectory import DIFFUSION, FAINT, NoisePath, ddim_step, predicted_eps

Denoise = Callable[[torch.Tensor, float, int], torch.Tensor]
"""`denoise(x, sigma, level)`: the model's estimate of the clean latent at `x`. `level`: that of the trajectory which `x`
stands on, or 0 if it is on none (or on the clean picture's)."""


class Transition(NamedTuple):
    """One inversion step from `sigma_from` up to `sigma_to`; the UNet is told it sees `sigma_model`."""

    sigma_from: float
    sigma_model: float
    sigma_to: float


def inversion_transitions(sigmas: torch.Tensor) -> list[Transition]:
    """The N transitions from the clean image to the noisiest level, the exact reverse of the sampler's N steps.

    `sigmas`: [N+1] ascending, `sigmas[0] == 0`. The UNet is told the level the latent is on (pix2pix-zero eq. 1); only
    the first step, from the clean image, where eps is undefined, is labelled with the level it moves to.

    Raises ValueError if `sigmas` does not ascend from 0.
    """
    grid = sigmas.tolist()
    if grid[0] != 0.0 or any(a >= b for a, b in zip(grid, grid[1:])):
        raise ValueError("The noise levels of an inversion must ascend from 0.")
    return [Transition(a, a or b, b) for a, b in zip(grid, grid[1:])]


def diffusers_transitions(sigmas: torch.Tensor, table: torch.Tensor) -> list[Transition]:
    """Inversion as diffusers' DDIMInverseScheduler does it: labelled with the level it moves to, from `table[0]`.

    `table`: the model's noise level at each timestep, ascending. The clean image is taken to be at its first entry.
    With v-prediction the results differ: diffusers tells the UNet one level and reads its output at another.
    """
    grid = [float(table[0]), *sigmas.tolist()[1:]]
    return [Transition(a, b, b) for a, b in zip(grid, grid[1:])]


def invert(
    latent: torch.Tensor,
    transitions: list[Transition],
    denoise: Denoise,
    regularize: Callable[[torch.Tensor], torch.Tensor],
    on_step: Callable[[int, torch.Tensor, torch.Tensor], Any],
    path: NoisePath = DIFFUSION,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Deterministic DDIM inversion with regularized noise maps (pix2pix-zero eq. 1 and 3).

    `latent`: clean latent [B, C, H, W]. `on_step(index, denoised, x)` is called after every step. Returns the latents at
    the start and after each transition, and the estimates made at all of them but the last.
    """
    x = path.rescale(latent, 0.0, transitions[0].sigma_from)
    visited, estimates = [x], []
    for index, (sigma_from, sigma_model, sigma_to) in enumerate(transitions):
        seen = path.rescale(x, sigma_from, sigma_model)
        denoised = denoise(seen, sigma_model, index)
        noise = regularize(path.noise_in(seen, denoised, sigma_model))
        x = path.step(x, noise, sigma_from, sigma_to)
        visited.append(x)
        estimates.append(denoised)
        on_step(index, denoised, x)
    return visited, estimates


class FixedPoint(NamedTuple):
    """`iterations`: substitutions in each step, see `invert_fixed_point`. `path`: how latents mix picture and noise."""

    iterations: int = 1
    path: NoisePath = DIFFUSION


def invert_fixed_point(
    latent: torch.Tensor,
    sigmas: torch.Tensor,
    denoise: Denoise,
    regularize: Callable[[torch.Tensor], torch.Tensor],
    on_step: Callable[[int, torch.Tensor, torch.Tensor], Any],
    how: FixedPoint,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inversion whose every step the sampler's step undoes (Pan et al. 2023, AIDI; Garibi et al. 2024, ReNoise).

    DDIM steps down along the noise predicted at the noisier latent, which `invert` has not reached yet: it steps up along
    that of the cleaner one. Here x_i solves the equation of the step down, in sigma space

        x_i = x_{i-1} + (sigma_i - sigma_{i-1}) eps(x_i, sigma_i),

    by `how.iterations` substitutions into its right-hand side, starting along the regularized `expected_eps`. A picture that a
    substitution takes further from solving it stays at the best latent. Without iterations it takes no more evaluations
    than `invert`.

    `latent`: clean latent [B, C, H, W]. `sigmas`: [N+1] ascending from 0. `on_step(index, denoised, x)` is called after
    every step, with the estimate at x, the latent it leads to. Returns the N+1 latents, and the estimates made at all of
    them but the first.
    """
    grid, path = sigmas.tolist(), how.path
    seen = path.rescale(latent, 0.0, grid[1])
    noise = path.noise_in(seen, denoise(seen, grid[1], 0), grid[1])
    visited, estimates, found = [latent], [], []
    for level in range(1, len(grid)):
        equation = _StepDown(visited[-1], grid[level - 1], grid[level], denoise, path)
        if found:
            noise = expected_eps(found, grid[level], path)
        start = equation.step_up(regularize(noise))
        x, denoised = _solve(equation, start, level, how.iterations)
        visited.append(x)
        estimates.append(denoised)
        found = [*found[-1:], (grid[level], path.noise_in(x, denoised, grid[level]))]
        on_step(level - 1, denoised, x)
    return visited, estimates


@dataclass(frozen=True)
class _StepDown:
    """The equation x = before + (sigma - sigma_before) eps(x, sigma), which says that the step down from x undoes it."""

    before: torch.Tensor
    sigma_before: float
    sigma: float
    denoise: Denoise
    path: NoisePath = DIFFUSION

    def step_up(self, noise: torch.Tensor) -> torch.Tensor:
        return self.path.step(self.before, noise, self.sigma_before, self.sigma)

    def substitute(self, x: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x, the estimate there, the equation's right-hand side)."""
        denoised = self.denoise(x, self.sigma, level)
        if self.path.picture(self.sigma) < FAINT:  # the noise in such a latent is the latent itself
            velocity = predicted_eps(x, denoised, self.sigma)
            return x, denoised, ddim_step(self.before, velocity, self.sigma_before, self.sigma)
        return x, denoised, self.step_up(self.path.noise_in(x, denoised, self.sigma))


def _solve(equation: _StepDown, x: torch.Tensor, level: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent closest to solving the equation after so many substitutions, and the estimate there.

    Only the last one is expected to stay on the trajectory, at `level`.
    """
    best = equation.substitute(x, 0 if iterations else level)
    closer = torch.ones_like(x[:, :1, :1, :1], dtype=torch.bool)
    for left in reversed(range(iterations)):
        x, _, substituted = best
        trial = equation.substitute(torch.where(closer, substituted, x), 0 if left else level)
        closer = closer & (_unsolved(trial) < _unsolved(best))
        best = tuple(torch.where(closer, new, old) for new, old in zip(trial, best))
        if not closer.any():
            break
    return best[:2]


def expected_eps(found: list[tuple[float, torch.Tensor]], sigma: float, path: NoisePath = DIFFUSION) -> torch.Tensor:
    """The noise to expect at the next level: that of the last one, or on a line through the last two (sigma, eps).

    The line is drawn over the angle between picture and noise in a variance-preserving latent (Salimans and
    Ho 2022, appendix D), along which they turn evenly.
    """
    if len(found) == 1:
        return found[0][1]
    (sigma_a, eps_a), (sigma_b, eps_b) = found
    angle_a, angle_b, angle = map(path.angle, (sigma_a, sigma_b, sigma))
    ahead = (angle - angle_b) / (angle_b - angle_a)
    return torch.lerp(eps_a, eps_b, 1 + ahead)


def _unsolved(substitution: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """How far a latent is from solving the equation of the step down, per picture: [B, 1, 1, 1]."""
    x, _, substituted = substitution
    return (substituted - x).square().sum((1, 2, 3), keepdim=True)


def on_grid(
    visited: list[torch.Tensor],
    transitions: list[Transition],
    latent: torch.Tensor,
    sigmas: torch.Tensor,
    path: NoisePath = DIFFUSION,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The visited latents as a trajectory on the sampler's grid: [N+1, B, C, H, W] on the CPU, in another dtype if wanted.

    Each latent is written at the grid level it stands for, counted from the noisiest; where the inversion skipped the
    first levels, and at level 0, stands the clean `latent`.
    """
    reached = [transitions[0].sigma_from, *(transition.sigma_to for transition in transitions)]
    grid = sigmas.tolist()
    offset = len(grid) - len(reached)
    clean = [path.rescale(latent, 0.0, sigma) for sigma in grid[: max(offset, 1)]]
    kept = [
        path.rescale(x, own, sigma)
        for x, own, sigma in zip(visited[len(clean) - offset :], reached[len(clean) - offset :], grid[len(clean) :])
    ]
    return torch.stack([x.to(device="cpu", dtype=dtype) for x in clean + kept])


def reconstruct(
    noise: torch.Tensor, sigmas: torch.Tensor, denoise: Callable[[torch.Tensor, float], torch.Tensor]
) -> torch.Tensor:
    """Plain DDIM from `noise` [B, C, H, W], the last latent of a trajectory, down to the clean picture.

    `sigmas`: [N+1] ascending from 0. `denoise(x, sigma)`: the model's estimate of the clean latent for the source text.
    """
    x, grid = noise, sigmas.tolist()[::-1]
    for sigma, sigma_to in zip(grid, grid[1:]):
        x = ddim_step(x, predicted_eps(x, denoise(x, sigma), sigma), sigma, sigma_to)
    return x


def latent_psnr(latent: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of latents [B, C, H, W] to clean ones, whose own range of values is the peak: [B].

    That of clean ones of a single value, which have no range, is 1.
    """
    dims = (1, 2, 3)
    squared_error = (latent - clean).square().mean(dims).clamp_min(torch.finfo(clean.dtype).tiny)
    peak = clean.amax(dims) - clean.amin(dims)
    return 20 * torch.where(peak > 0, peak, 1.0).log10() - 10 * squared_error.log10()


def aligned_residuals(
    trajectory: torch.Tensor,
    sigmas: torch.Tensor,
    visited: list[torch.Tensor],
    estimates: list[torch.Tensor],
    path: NoisePath = DIFFUSION,
) -> torch.Tensor:
    """As `direct_residuals`, for steps down that are evaluated where the steps up were, `Inversion.seen_level`.

    `visited`, `estimates`: the latents of the way up and the model's estimates there, `estimates[i - 1]` at `visited[i]`,
    for the levels 1 to N - 1, or for level 1 if N is 1. The noise is taken from these two: next to no noise, that of a
    `trajectory` in half precision would be rounding. Residuals of steps whose noise was not regularized are rounding, but
    the last step's.
    """
    levels = sigmas.tolist()
    residuals = []
    for i in range(1, len(levels)):
        seen = max(i - 1, 1)
        x = trajectory[i].to(visited[seen])
        stepped = path.step_by(x, visited[seen], estimates[seen - 1], (levels[seen], levels[i], levels[i - 1]))
        residuals.append((trajectory[i - 1] - stepped.cpu()).to(trajectory.dtype))
    return torch.stack(residuals)


def direct_residuals(trajectory: torch.Tensor, sigmas: torch.Tensor, estimates: list[torch.Tensor]) -> torch.Tensor:
    """What each DDIM step down from the trajectory misses the trajectory by: [N, B, C, H, W] on the CPU.

    Added after each sampling step, it makes the unedited picture come out exactly (PnP Inversion, Ju et al. 2024,
    Algorithm 1, where it is the source branch that is corrected). `residuals[i - 1]` belongs to the step from level i
    to i - 1. `estimates[i - 1]`: the model's at `trajectory[i]`, `sigmas[i]`, for the source text.
    """
    grid = sigmas.tolist()
    residuals = []
    for i in range(1, len(grid)):
        estimate = estimates[i - 1]
        x = trajectory[i].to(estimate)
        stepped = ddim_step(x, predicted_eps(x, estimate, grid[i]), grid[i], grid[i - 1])
        residuals.append((trajectory[i - 1] - stepped.cpu()).to(trajectory.dtype))
    return torch.stack(residuals)


def corrected_picture(
    trajectory: torch.Tensor, sigmas: torch.Tensor, estimates: list[torch.Tensor], residuals: torch.Tensor
) -> torch.Tensor:
    """What the steps down, each with its residual, end on in the numbers' own precision: [B, C, H, W] on the CPU.

    It is the picture up to rounding; where the estimates are far larger than the picture, that is all that is left.
    Arguments and result as in `direct_residuals`.
    """
    grid = sigmas.tolist()
    x = trajectory[-1].to(estimates[-1])
    for i in range(len(grid) - 1, 0, -1):
        x = ddim_step(x, predicted_eps(x, estimates[i - 1], grid[i]), grid[i], grid[i - 1]) + residuals[i - 1].to(x)
    return x.cpu()
