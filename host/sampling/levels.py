"""The noise levels that a picture is inverted and redrawn on: entries of the model's own table, see `editing.ddim`."""

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from .checks import check_diffusion

SCHEDULERS = ("ddim_uniform", "simple")


def ddim_grid(model: ModelPatcher, steps: int, scheduler: str = "ddim_uniform") -> torch.Tensor:
    """Noise levels descending to 0, [steps + 1]. Those above 0 are entries of the model's table of noise levels.

    `scheduler`: "ddim_uniform" counts from the cleanest level, as DDIM does (Song et al. 2021), and has more levels where
    `steps` does not divide the table; "simple" counts from the noisiest, as models that draw in few steps are trained,
    and has exactly `steps`.

    Raises ValueError for a model that does not diffuse on discrete variance-preserving steps, or that has fewer levels.
    """
    check_diffusion(model)
    sampling = model.get_model_object("model_sampling")
    table = len(sampling.sigmas)  # an LCM has 50 where others have 1000
    if not 1 <= steps <= table:
        raise ValueError(f"steps: {steps} is outside 1 to {table}, the number of the model's noise levels.")
    return comfy.samplers.calculate_sigmas(sampling, scheduler, steps)


def places_on_table(sampling, sigmas: torch.Tensor) -> torch.Tensor:
    """The index of each noise level [N] in a model sampling's table: int64 [N]. Only in a table of 1000 is it the timestep."""
    return (sigmas[:, None].log() - sampling.log_sigmas.to(sigmas)).abs().argmin(1)
