"""A model that diffuses, seen as a flow model: the same network, asked in the coordinates of straight paths."""

import torch
from comfy import model_sampling
from comfy.model_patcher import ModelPatcher


class FlowView(model_sampling.ModelSamplingDiscreteFlow, model_sampling.CONST):
    """The sampling of a flow model whose network diffuses as `base`: share of noise s = sigma / (1 + sigma).

    A latent (1 - s) * picture + s * noise is 1 - s times the one that `base` has at its noise level sigma.
    """

    def __init__(self, base):
        torch.nn.Module.__init__(self)
        self.base = base
        self.noise_scale = 1.0  # of newer hosts, 1 for all but a few models
        self.register_buffer("sigmas", base.sigmas / (1 + base.sigmas))

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.base.timestep(_sigma_of(sigma))

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        return _share_of(self.base.sigma(timestep))

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0.0:
            return 1.0
        return 0.0 if percent >= 1.0 else _share_of(self.base.percent_to_sigma(percent))

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.base.calculate_input(_sigma_of(sigma), _stretched(noise, sigma))

    def calculate_denoised(self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor):
        return self.base.calculate_denoised(_sigma_of(sigma), model_output, _stretched(model_input, sigma))


def as_flow(model: ModelPatcher) -> ModelPatcher:
    """A clone of a MODEL that diffuses, as a flow model that draws the same."""
    model = model.clone()
    model.add_object_patch("model_sampling", FlowView(model.get_model_object("model_sampling")))
    return model


def _sigma_of(share):
    return share / (1 - share)


def _share_of(sigma):
    return sigma / (1 + sigma)


def _stretched(x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return x / (1 - share.reshape(-1, *[1] * (x.ndim - 1)))
