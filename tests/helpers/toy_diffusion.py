"""Stable Diffusion's noise schedule, and small analytic "UNets" on it, in float64 and variance-preserving terms."""

import math

import torch

ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
SIGMA = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()


def timesteps(steps: int) -> list[int]:
    """Ascending, as the samplers of Stable Diffusion space them: 1, 1 + 1000/steps, ..."""
    return [1 + i * (1000 // steps) for i in range(steps)]


def sigmas(steps: int) -> torch.Tensor:
    """[steps + 1], ascending from 0."""
    return torch.tensor([0.0, *(float(SIGMA[t]) for t in timesteps(steps))], dtype=torch.float64)


def timestep_of(sigma: float) -> int:
    return int((SIGMA - sigma).abs().argmin())


def vp_scale(sigma: float) -> float:
    return math.sqrt(1 + sigma**2)


def step_in_alpha_bar(
    x: torch.Tensor, eps: torch.Tensor, alpha_bar: torch.Tensor, alpha_bar_next: torch.Tensor
) -> torch.Tensor:
    """Song et al. 2021, eq. 12 with eta = 0, on a variance-preserving latent."""
    clean = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    return alpha_bar_next.sqrt() * clean + (1 - alpha_bar_next).sqrt() * eps


def toy_eps(x: torch.Tensor, t: int) -> torch.Tensor:
    """A smooth noise estimate that depends on the latent and on the timestep."""
    return torch.tanh(x * (0.5 + t / 1000)) + 0.3 * torch.sin(x.roll(1, -1))


def denoiser(eps=toy_eps):
    """`denoise(x, sigma)` of the sigma-space functions, from a variance-preserving `eps(x, t)`."""
    return lambda x, sigma: x - sigma * eps(x / vp_scale(sigma), timestep_of(sigma))
