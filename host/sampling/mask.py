"""Where a picture may change: one answer for all methods."""

from dataclasses import replace

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider

from ...editing.trajectory import Inversion
from .checks import check_finite, pixels_per_latent


class NoiseMask:
    """The inversion's noise mask in one sampling, as Differential Diffusion and the like change it along the way.

    `sigmas`: the noise levels of that sampling, descending.
    """

    def __init__(self, inversion: Inversion, guider: CFGGuider, model_options: dict, sigmas: torch.Tensor):
        self.mask = inversion.noise_mask
        self.change = model_options.get("denoise_mask_function")
        self.context = {"model": guider, "sigmas": sigmas}

    def at(self, sigma: float, like: torch.Tensor) -> torch.Tensor | None:
        """The mask at a noise level in the shape of `like` [B, C, H, W], or None where everything may change."""
        if self.mask is None:
            return None
        mask = _latent_mask(self.mask, like)
        if self.change is None:
            return mask
        return self.change(like.new_full((len(like),), sigma), mask, extra_options=self.context)


def masked(inversion: Inversion, mask: torch.Tensor | None) -> Inversion:
    """The inversion limited to a MASK [B or 1, height, width] as well, 1 where the picture may change.

    Raises ValueError for NaN.
    """
    if mask is None:
        return inversion
    check_finite(mask, "mask", "Draw it again.")
    mask = _latent_mask(mask, inversion.trajectory[0])
    if inversion.noise_mask is not None:
        mask = mask * _latent_mask(inversion.noise_mask, inversion.trajectory[0])
    return replace(inversion, noise_mask=mask)


def edited_area(model: ModelPatcher, inversion: Inversion, blend_mask: torch.Tensor | None) -> torch.Tensor:
    """Where a picture could change in an edit, as a MASK [B, height, width] of the picture's size.

    `blend_mask`: [B, 1, H, W] in 0..1, what a local blend has found, if there is one.
    """
    latent = inversion.trajectory[0]
    area = torch.ones_like(latent[:, :1])
    if inversion.noise_mask is not None:
        area = _latent_mask(inversion.noise_mask, latent)[:, :1]
    if blend_mask is not None:
        area = area * blend_mask.to(area)
    ratio = pixels_per_latent(model)
    area = torch.nn.functional.interpolate(area, scale_factor=ratio, mode="bilinear", align_corners=False)[:, 0]
    return area.to(comfy.model_management.intermediate_device())


def _latent_mask(mask: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    return comfy.utils.reshape_mask(mask.float(), latent.shape).to(latent)
