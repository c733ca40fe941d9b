"""A model that diffuses, seen as a flow: the same network on straight lines between picture and noise.

What diffuses at sigma flows at s = sigma / (1 + sigma), where the latent is (1 - s) times that in sigma space.
"""

import torch
from comfy import model_sampling
from comfy.model_patcher import ModelPatcher


class FlowView(model_sampling.ModelSamplingDiscreteFlow, model_sampling.CONST):
    """A model sampling around that of an eps or v model, with the methods that ComfyUI asks of one."""

    def __init__(self, base: torch.nn.Module) -> None:
        torch.nn.Module.__init__(self)
        self.base = base
        self.noise_scale = 1.0
        self.register_buffer("sigmas", base.sigmas / (1 + base.sigmas))

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.base.timestep(sigma / (1 - sigma))

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        diffuses = self.base.sigma(timestep)
        return diffuses / (1 + diffuses)

    def percent_to_sigma(self, percent: float) -> float:
        if not 0 < percent < 1:
            return 1.0 if percent <= 0 else 0.0
        diffuses = self.base.percent_to_sigma(percent)
        return diffuses / (1 + diffuses)

    def calculate_input(self, sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.base.calculate_input(*_diffusing(sigma, x))

    def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        sigma, x = _diffusing(sigma, x)
        return self.base.calculate_denoised(sigma, output, x)


def _diffusing(sigma: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sigma / (1 - sigma), x / (1 - sigma.view(-1, *[1] * (x.ndim - 1)))


def as_flow(model: ModelPatcher) -> ModelPatcher:
    """A clone of an eps or v MODEL that flows."""
    flowing = model.clone()
    flowing.add_object_patch("model_sampling", FlowView(model.get_model_object("model_sampling")))
    return flowing
