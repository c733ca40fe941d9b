"""Generate a picture and keep its trajectory: the synthetic-image case of pix2pix-zero."""

from dataclasses import dataclass
from functools import partial

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ...editing.trajectory import Generated, Inversion, NoisePath, ddim_step, predicted_eps
from .. import running
from ..messages import GENERATING
from ..running import Run, sample
from ..text.conditionings import check_conditioning, check_lengths, check_whole_sampling, draws_negative
from .checks import AUTO, check_numbers, clean_latent, ddim_grid, made_with, noise_path, too_large, unframed
from .invert import affordable_latents

ALL_NOISE = 0.9  # part of the model's own noise that a picture can be drawn from


@dataclass(frozen=True)
class ReferenceSettings:
    """`steps`, `scheduler`, `sigmas`: see `ddim_grid`. `cfg`: of classifier-free guidance. `seed`: of the noise."""

    steps: int = 50
    cfg: float = 5.0
    seed: int = 0
    scheduler: str = AUTO
    sigmas: torch.Tensor | None = None


def generate_reference(
    model: ModelPatcher, positive: list, negative: list, latent_image: dict, settings: ReferenceSettings
) -> tuple[Inversion, torch.Tensor]:
    """Generate a picture by DDIM from seeded noise and keep its trajectory: (inversion, LATENT samples).

    Raises ValueError for a model, latent, text or number that does not fit.
    """
    check_numbers(cfg=settings.cfg)
    sigmas = ddim_grid(model, settings.steps, settings.scheduler, settings.sigmas)
    if settings.sigmas is not None:
        _check_start(model, sigmas)
    empty = clean_latent(model, latent_image)
    for conditioning, socket in ((positive, "positive"), (negative, "negative")):
        check_conditioning(conditioning, len(empty), socket)
        check_lengths(conditioning, model, socket)
    check_whole_sampling(positive, model, sigmas, "positive")
    if draws_negative(model, settings.cfg):
        check_whole_sampling(negative, model, sigmas, "negative")
    for advice in too_large(model, empty):
        running.warn(advice)
    kept_in, _ = affordable_latents(model, empty, len(sigmas) - 1, corrections=0)
    noise = comfy.sample.prepare_noise(empty, settings.seed, latent_image.get("batch_index"))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(settings.cfg)
    latent, trajectory = sample(
        guider, partial(_walk_down, noise_path(model), noise, kept_in), model.model.process_latent_out(noise), sigmas
    )
    generated = Generated(settings.cfg, negative)
    return Inversion(trajectory, sigmas.flip(0), positive, generated=generated, **made_with(model)), latent


def _check_start(model: ModelPatcher, sigmas: torch.Tensor) -> None:
    path, begin = noise_path(model), float(sigmas[0])
    noisiest = float(model.get_model_object("model_sampling").sigma_max)
    if path.share(begin) < ALL_NOISE * path.share(noisiest):
        raise ValueError(
            f"sigmas: a picture is drawn from noise, and they begin at {begin:.4g} of {noisiest:.4g}. "
            "Connect all levels of a scheduler node with denoise 1."
        )


def _walk_down(
    path: NoisePath, noise: torch.Tensor, kept_in: torch.dtype, run: Run
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the picture, its trajectory [N+1, B, C, H, W] ascending, on the CPU)."""
    grid = run.sigmas.tolist()
    # The host mixes a flow's start with its share of a picture, of which pure noise has none.
    start = unframed(noise).to(run.x) if path.straight else run.x
    x = path.rescale(start, 0.0, grid[0])
    visited = [x.cpu()]
    for index, (sigma, sigma_next) in enumerate(zip(grid, grid[1:])):
        denoised = run.model_k(x, x.new_full((len(x),), sigma), **run.extra_args)
        x = ddim_step(x, predicted_eps(x, denoised, sigma), sigma, sigma_next)
        visited.append(x.cpu())
        run.report(GENERATING, index, denoised, x)
    return x, torch.stack([latent.to(kept_in) for latent in visited[::-1]])
