"""What an edit by its prompt is, and what of the source stays while a stock sampler steps through it."""

from dataclasses import dataclass

import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.samplers import Sampler

from ...editing.token_alignment import TokenMap
from ...editing.trajectory import Inversion
from ...editing.word_masks import WordMask, soft_mask
from ..sampling.source import NoiseMask
from ..text.conditionings import says_something
from ..unet.jobs import LEFT_OUT


@dataclass(frozen=True)
class PromptEdit:
    """An edit of an inverted picture by its prompt.

    `cross_end`, `self_end`: the noise levels down to which the edit takes the source's cross- and self-attention.
    `factors`: [T] for the columns of the edited maps, or None. `blend`: threshold in 0..1 of the mask outside which the
    picture stays, or 0 for none; it acts below the noise level `blend_start`, and is drawn from `blend_tokens` of the source
    and of the target.
    """

    inversion: Inversion
    token_map: TokenMap
    cross_end: float
    self_end: float
    factors: torch.Tensor | None
    blend: float
    blend_start: float
    blend_tokens: tuple[list[int], list[int]]

    def blend_mask(self, words: list[WordMask], x: torch.Tensor, sigma: float) -> torch.Tensor | None:
        """[B, 1, H, W] for latents `x`, 1 where the edited words are drawn; None where no local blend limits the edit."""
        if not self.blend or sigma >= self.blend_start:
            return None
        areas = [each.area(self.blend) for each in words if each.total is not None]
        return soft_mask(areas, x.shape[-2:]).to(x) if areas else None


def check_attended(complete: bool, source: list[dict], latent: torch.Tensor, timestep: torch.Tensor) -> None:
    """Raise ValueError with the reason if an evaluation of the processed `source` has not shown all of its attention."""
    if complete:
        return
    if says_something(source, latent, timestep):
        raise ValueError(LEFT_OUT)
    raise ValueError(
        "inversion: its caption is limited to a part of the sampling. Invert the picture with a plain text."
    )


def takes_ddim_steps(sampler: Sampler) -> bool | None:
    """Whether a sampler goes from level to level along the estimate alone, as DDIM does: euler and ddim do.

    None for one that is not the host's own, which is to be seen.
    """
    function = getattr(sampler, "sampler_function", None)
    if function is sample_euler:
        return not sampler.extra_options.get("s_churn", 0.0)
    return False if function is None or function.__module__.startswith("comfy.") else None


class KeptEstimate:
    """What of the source stays in a sampling that a stock sampler steps through: a change of its estimates.

    `sigmas`: its noise levels, descending. `ddim_steps`: see `takes_ddim_steps`; where it is to be seen, `strays` [B, 1, 1, 1]
    says which pictures have been stepped otherwise.
    """

    def __init__(self, inversion: Inversion, mask: NoiseMask, sigmas: torch.Tensor, ddim_steps: bool | None):
        self.inversion = inversion
        self.mask = mask
        self.sigmas = sigmas.tolist()
        self.ddim_steps = ddim_steps
        self.landing: tuple[float, torch.Tensor] | None = None
        self.strays: torch.Tensor | None = None

    def restore(
        self, denoised: torch.Tensor, x: torch.Tensor, sigma: float, blend: torch.Tensor | None
    ) -> torch.Tensor:
        """The estimate, made at `x`, with the inversion's residual, and the source's estimate outside the masks.

        A DDIM step from sigma to sigma' takes `x` to `r * x + (1 - r) * denoised` with `r = sigma' / sigma`: it is made to
        land where the edit wants the latent. Other samplers extrapolate or add noise: they are given the source's own
        clean estimate, and no residual.
        """
        lower = [level for level in self.sigmas if level < sigma * (1 - 1e-4)]
        if not lower:
            return denoised
        source = self.inversion.estimate_at(sigma).to(x)
        ratio = max(lower) / sigma
        strays = self._strays(x, sigma)
        if not strays.all():
            landing, corrected = self.inversion.place_of(max(lower)), denoised
            if self.inversion.residuals is not None and self.inversion.place_of(sigma) == landing + 1:
                corrected = denoised + self.inversion.residuals[int(landing)].to(x) / (1 - ratio)
            landed = (self.inversion.latent_at(max(lower)).to(x) - ratio * x) / (1 - ratio)
            denoised, source = torch.where(strays, denoised, corrected), torch.where(strays, source, landed)
        mask = self.mask.at(sigma, x)
        if blend is not None:
            mask = blend if mask is None else mask * blend
        if mask is not None:
            denoised = mask * denoised + (1 - mask) * source
        self.landing = max(lower), ratio * x + (1 - ratio) * denoised
        return denoised

    def _strays(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Which pictures are not stepped as by DDIM, as is known of the sampler, or as its steps so far have shown."""
        if self.strays is None:
            self.strays = torch.full((len(x), 1, 1, 1), self.ddim_steps is False, device=x.device)
        if self.ddim_steps is None and self.landing is not None:
            level, expected = self.landing
            off, spread = (x - expected).abs().amax((1, 2, 3), True), expected.std((1, 2, 3), keepdim=True)
            self.strays = self.strays | (off > 1e-3 * spread) | (abs(level - sigma) > 1e-4 * sigma)
        return self.strays
