"""Deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0) in sigma space, in both directions.

A variance-preserving latent `x_vp` at noise level `alpha_bar` is held as `x = x_vp * sqrt(1 + sigma^2)` with
`sigma = sqrt((1 - alpha_bar) / alpha_bar)`. In these coordinates DDIM is one line whatever the model predicts:
`x(sigma') = denoised + eps * sigma'` with `eps = (x - denoised) / sigma`.
"""

from typing import NamedTuple

import torch


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
    levels = sigmas.tolist()
    if levels[0] != 0.0 or any(a >= b for a, b in zip(levels, levels[1:])):
        raise ValueError("The noise levels of an inversion must ascend from 0.")
    return [Transition(a, a or b, b) for a, b in zip(levels, levels[1:])]


def diffusers_transitions(sigmas: torch.Tensor, table: torch.Tensor) -> list[Transition]:
    """Inversion as diffusers' DDIMInverseScheduler does it: labelled with the level it moves to, from `table[0]`.

    `table`: the model's noise level at each timestep, ascending. The clean image is taken to be at its first entry.
    With v-prediction the results differ: diffusers tells the UNet one level and reads its output at another.
    """
    levels = [float(table[0]), *sigmas.tolist()[1:]]
    return [Transition(a, b, b) for a, b in zip(levels, levels[1:])]


def official_transitions(timesteps: torch.Tensor, table: torch.Tensor) -> list[Transition]:
    """Inversion as the authors' code does it (pix2pixzero ddim_inv.py, scheduler.py): N - 2 transitions.

    The first and last of the N timesteps are left out, each level is read one timestep early, and the clean image is
    taken to be at the level where the second step starts. `timesteps`: [N] ascending integers, at least 3.

    Raises ValueError for fewer than 3 timesteps.
    """
    if len(timesteps) < 3:
        raise ValueError("steps: the official inversion needs at least 3.")
    stride = int(timesteps[1] - timesteps[0])
    return [
        Transition(float(table[t - 1]), float(table[t]), float(table[t - 1 + stride])) for t in timesteps[1:-1].tolist()
    ]


def rescale(x: torch.Tensor, sigma_from: float, sigma_to: float) -> torch.Tensor:
    """The same variance-preserving latent, written at another noise level: what the UNet sees stays the same."""
    return x * ((1 + sigma_to**2) / (1 + sigma_from**2)) ** 0.5


def predicted_eps(x: torch.Tensor, denoised: torch.Tensor, sigma: float) -> torch.Tensor:
    """The predicted noise map, for eps- and v-prediction models alike. `sigma` > 0."""
    return (x - denoised) / sigma


def step(x: torch.Tensor, eps: torch.Tensor, sigma_from: float, sigma_to: float) -> torch.Tensor:
    """One DDIM step along `eps` from one noise level to another, up or down."""
    return x + eps * (sigma_to - sigma_from)
