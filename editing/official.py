"""What the authors' code does otherwise than their paper (pix2pixzero: ddim_inv.py, scheduler.py, edit_pipeline.py)."""

import torch

from .guidance import DenoisingPasses, GuidanceSchedule, KeptSource, OnStep, plain_step
from .inversion import Transition
from .trajectory import DIFFUSION, Inversion, ddim_step, predicted_eps


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


def sample_official(
    inversion: Inversion,
    passes: DenoisingPasses,
    x: torch.Tensor,
    guidance: GuidanceSchedule,
    kept: KeptSource,
    on_step: OnStep,
) -> torch.Tensor:
    """The authors' update (pix2pixzero edit_pipeline.py), step for step.

    It differs from `sample_guided` in four ways. The reference maps come from a reconstruction pass of its own, run
    here in lockstep. Both branches are matched and shifted, each along its own gradient, averaged over the heads of
    both. The UNet's outputs at the two are mixed, but the latent that steps on is the negative one. The last step ends
    on the schedule's first noise level, `guidance.final_sigma`, and its latent is returned as if it were clean.
    """
    sigmas = [guidance.final_sigma, *(float(s) for s in inversion.sigmas[1:])]
    source_x = x
    for step, level in enumerate(range(inversion.steps, 0, -1)):
        sigma, sigma_next = sigmas[level], sigmas[level - 1]
        strength = guidance.strength_at(sigma, step, inversion.steps)
        shifted, distance = {"positive": x, "negative": x}, None
        if strength:
            for branch, source_branch in (("negative", "negative"), ("positive", "source")):
                reference = passes.record_maps(source_branch, source_x, sigma)
                gradient, distance = passes.map_gradient(branch, x, sigma, reference)
                shifted[branch] = x + plain_step(gradient / 2, sigma, guidance.guidance_strength)
        if guidance.guidance_strength:
            source_denoised = _mixed_denoised(passes, {"source": source_x, "negative": source_x}, sigma)
            source_eps = predicted_eps(source_x, source_denoised, sigma)
            source_x = ddim_step(source_x, source_eps, sigma, sigma_next)
        denoised = _mixed_denoised(passes, shifted, sigma)
        x = shifted["negative"]
        x = ddim_step(x, predicted_eps(x, denoised, sigma), sigma, sigma_next)
        if level == 1:
            x = DIFFUSION.rescale(x, guidance.final_sigma, 0.0)
        x = kept.restore(x, level - 1)
        on_step(step, denoised, x, distance)
    return x


def _mixed_denoised(passes: DenoisingPasses, latents: dict[str, torch.Tensor], sigma: float) -> torch.Tensor:
    """The guided estimate at the negative latent, of the UNet's outputs for two branches, each at its own latent."""
    (branch, x), (negative, x_negative) = latents.items()
    denoised = passes.denoise_branch(branch, x, sigma)
    if x is not x_negative:
        denoised = passes.estimate_elsewhere(denoised, x, x_negative, sigma)
    return passes.mix_branches(denoised, passes.denoise_branch(negative, x_negative, sigma), x_negative, sigma)
