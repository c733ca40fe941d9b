"""Cross-attention guidance: denoise along the edited text while the maps of the source picture hold the structure.

pix2pix-zero section 3.3, eq. 4 and Algorithm 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from . import ddim
from .local_blend import LocalBlend
from .trajectory import Inversion

Maps = dict[Any, torch.Tensor]

# Gradient steps of one size add up over an edit: strengths are given for the paper's number of steps.
REFERENCE_STEPS = 50


class DenoisingPasses(Protocol):
    """The UNet evaluations that the samplers below are written in. `x`: [B, C, H, W] at noise level `sigma`."""

    def denoise(self, x: torch.Tensor, sigma: float, hold_negative: bool = False) -> torch.Tensor:
        """Classifier-free guided estimate of the clean latent for the edited text.

        `hold_negative`: take the negative text's noise to be as far from the edited one's as in the last evaluation.
        """

    def denoise_branch(self, branch: str, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Estimate for one conditioning alone: "positive", "negative" or "source"."""

    def mix_branches(
        self, positive: torch.Tensor, negative: torch.Tensor, x: torch.Tensor, sigma: float
    ) -> torch.Tensor:
        """Classifier-free guidance of two estimates made at `x`."""

    def estimate_elsewhere(
        self, denoised: torch.Tensor, x: torch.Tensor, x_there: torch.Tensor, sigma: float
    ) -> torch.Tensor:
        """The estimate that the UNet output behind `denoised`, made at `x`, would mean at another latent."""

    def record_maps(self, branch: str, x: torch.Tensor, sigma: float) -> Maps:
        """Cross-attention maps of one branch, one tensor [B, heads, H*W, tokens] per site, in fp32."""

    def map_gradient(
        self, branch: str, x: torch.Tensor, sigma: float, reference: Maps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of the attention distance with respect to `x`, and the distance per sample [B]."""

    def denoise_and_match(
        self, x: torch.Tensor, sigma: float, reference: Maps, hold_negative: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`denoise`, and in the same UNet call of the positive branch its `map_gradient`: (estimate, gradient, distance)."""

    def contrast(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """How far apart the estimates for edited and source text are at `x`, where `denoise` was last: [B, 1, H, W]."""


@dataclass(frozen=True)
class GuidanceSchedule:
    """When guidance acts, and how strongly.

    `guidance_strength`: size of a gradient step. `first`, `last`: it acts on noise levels `last` <= sigma <= `first`. `every`: it
    acts on one of so many steps, the middle one, with as many times the strength. `share`: in 0..1, part of the steps in
    which it acts, from the noisiest on. `holds_negative`: the negative text is evaluated at every other step only.
    `final_sigma`: where `sample_official` ends.
    """

    guidance_strength: float
    first: float = float("inf")
    last: float = 0.0
    every: int = 1
    share: float = 1.0
    holds_negative: bool = False
    final_sigma: float = 0.0

    def strength_at(self, sigma: float, step: int, steps: int) -> float:
        """Size of the gradient step at `step`, counted from 0 at the noisiest. 0: no gradient is needed."""
        turn = step % self.every == min(self.every, steps) // 2
        acts = self.last <= sigma <= self.first and step < self.share * steps and turn
        return self.guidance_strength * self.every if acts else 0.0

    def holds_negative_at(self, step: int) -> bool:
        """Whether the negative text's prediction follows from the step before."""
        return self.holds_negative and step % 2 == 1


def guidance_shift(gradient: torch.Tensor, sigma: float, strength: float) -> torch.Tensor:
    """One gradient step of size `strength` on the latent as the UNet sees it, x / sqrt(1 + sigma^2), written in x."""
    return -strength * (1 + sigma**2) * gradient


OnStep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], Any]
"""`on_step(step, denoised, x, distance)`: called after every step, with the attention distance [B] that was found ahead of
it, None where nothing guides it."""


@dataclass(frozen=True)
class KeptSource:
    """What of the source picture stays as it is in an edit.

    `mask_at(level)`: the inpainting mask, 1 where the picture may change, None where it may everywhere. `blend`: finds
    where the edit does not act; a picture that it finds to be edited as a whole, in light or style, is guided no longer,
    since its maps have to change too.
    """

    inversion: Inversion
    mask_at: Callable[[int], torch.Tensor | None] = lambda level: None
    blend: LocalBlend | None = None

    def restore(self, x: torch.Tensor, level: int) -> torch.Tensor:
        """`x` [B, C, H, W] of a level with the source's own latent in the places that stay."""
        mask = self.mask_at(level)
        if mask is None and self.blend is None:
            return x
        source = self.inversion.trajectory[level].to(x)
        if self.blend is not None:
            x = self.blend.keep_source(x, source)
        return x if mask is None else mask * x + (1 - mask) * source

    @property
    def lets_guide(self) -> bool:
        """Whether any picture is to keep something, so far as is known."""
        return self.blend is None or self.blend.keeps_some is None or bool(self.blend.keeps_some.any())

    def guided_part(self, shift: torch.Tensor) -> torch.Tensor:
        """A shift [B, C, H, W] of those pictures that keep something."""
        return shift if self.blend is None else shift * self.blend.keeps_some.to(shift)


def sample_guided(
    inversion: Inversion,
    passes: DenoisingPasses,
    x: torch.Tensor,
    guidance: GuidanceSchedule,
    kept: KeptSource,
    on_step: OnStep,
) -> torch.Tensor:
    """DDIM from the inverted noise `x`, guided on the conditional branch by maps of the inversion's own trajectory.

    Algorithm 1 evaluates the UNet twice a step, for the gradient and again at the shifted latent. Here the same
    evaluation gives both: the UNet's output is taken to be the same at the shifted latent, which many steps make true.
    Where the model predicts eps, that adds the shift to what the DDIM step gives. Where it predicts v, a step down
    from pure noise makes it smaller in proportion. Fewer steps take larger shifts, so that a strength means the same for
    any number of them. The reference does not drift, and the inversion's residuals keep the unedited part exact.
    """
    for step, level in enumerate(range(inversion.steps, 0, -1)):
        sigma, sigma_next = (float(inversion.sigmas[i]) for i in (level, level - 1))
        strength = guidance.strength_at(sigma, step, inversion.steps)
        if strength and not kept.lets_guide:
            strength = 0.0
        hold = guidance.holds_negative_at(step)
        gradient = distance = None
        if strength:
            reference = reference_maps(inversion, passes, level, x)
            denoised, gradient, distance = passes.denoise_and_match(x, sigma, reference, hold)
        else:
            denoised = passes.denoise(x, sigma, hold)
        if kept.blend is not None:
            kept.blend.observe(passes.contrast(x, sigma), 1 - level / inversion.steps)
        here, estimate = x, denoised
        if gradient is not None:
            shift = guidance_shift(gradient, sigma, strength * REFERENCE_STEPS / inversion.steps)
            here = x + kept.guided_part(shift)
            estimate = passes.estimate_elsewhere(denoised, x, here, sigma)
        x = ddim.step(here, ddim.predicted_eps(here, estimate, sigma), sigma, sigma_next)
        if inversion.residuals is not None:
            x = x + inversion.residuals[level - 1].to(x)
        x = kept.restore(x, level - 1)
        on_step(step, denoised, x, distance)
    return x


def reference_maps(inversion: Inversion, passes: DenoisingPasses, level: int, x: torch.Tensor) -> Maps:
    """The source's maps at a level, as they were kept, or recorded from the stored latent on the device of `x`."""
    kept = None if inversion.maps is None else inversion.maps.get(level, x.device)
    if kept is not None:
        return kept
    return passes.record_maps("source", inversion.trajectory[level].to(x), float(inversion.sigmas[level]))


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
                shifted[branch] = x + guidance_shift(gradient / 2, sigma, strength)
        if guidance.guidance_strength:
            source_denoised = _mixed_denoised(passes, {"source": source_x, "negative": source_x}, sigma)
            source_eps = ddim.predicted_eps(source_x, source_denoised, sigma)
            source_x = ddim.step(source_x, source_eps, sigma, sigma_next)
        denoised = _mixed_denoised(passes, shifted, sigma)
        x = shifted["negative"]
        x = ddim.step(x, ddim.predicted_eps(x, denoised, sigma), sigma, sigma_next)
        if level == 1:
            x = ddim.rescale(x, guidance.final_sigma, 0.0)
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
