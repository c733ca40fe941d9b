"""Cross-attention guidance: denoise along the edited text while the maps of the source picture hold the structure.

pix2pix-zero section 3.3, eq. 4 and Algorithm 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from . import ddim
from .inversion import Inversion
from .local_blend import LocalBlend

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

    `strength`: size of a gradient step. `first`, `last`: it acts on noise levels `last` <= sigma <= `first`. `every`: it
    acts on one of so many steps, the middle one, with as many times the strength. `share`: in 0..1, part of the steps in
    which it acts, from the noisiest on. `holds_negative`: the negative text is evaluated at every other step only.
    """

    strength: float
    first: float = float("inf")
    last: float = 0.0
    every: int = 1
    share: float = 1.0
    holds_negative: bool = False

    def strength_at(self, sigma: float, step: int, steps: int) -> float:
        """Size of the gradient step at `step`, counted from 0 at the noisiest. 0: no gradient is needed."""
        turn = step % self.every == min(self.every, steps) // 2
        acts = self.last <= sigma <= self.first and step < self.share * steps and turn
        return self.strength * self.every if acts else 0.0

    def holds_negative_at(self, step: int) -> bool:
        """Whether the negative text's prediction follows from the step before."""
        return self.holds_negative and step % 2 == 1


def guidance_shift(gradient: torch.Tensor, sigma: float, strength: float) -> torch.Tensor:
    """One gradient step of size `strength` on the latent as the UNet sees it, x / sqrt(1 + sigma^2), written in x."""
    return -strength * (1 + sigma**2) * gradient


def sample_guided(
    inversion: Inversion,
    passes: DenoisingPasses,
    x: torch.Tensor,
    guidance: GuidanceSchedule,
    on_step: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], Any],
    keep_outside: Callable[[torch.Tensor, int], torch.Tensor],
    reference_maps: Callable[[int], Maps | None] = lambda index: None,
    blend: LocalBlend | None = None,
) -> torch.Tensor:
    """DDIM from the inverted noise `x`, guided on the conditional branch by maps of the inversion's own trajectory.

    Algorithm 1 evaluates the UNet twice a step, for the gradient and again at the shifted latent. Here the same
    evaluation gives both: the UNet's output is taken to be the same at the shifted latent, which many steps make true.
    Where the model predicts eps, that adds the shift to what the DDIM step gives. Where it predicts v, a step down
    from pure noise makes it smaller in proportion. Fewer steps take larger shifts, so that a strength means the same for
    any number of them. The reference does not drift, and the inversion's residuals keep the unedited part exact.

    `reference_maps(i)`: the maps kept of level i; where there are none, they are recorded from the stored latent.
    `keep_outside(x, i)`: restores the source outside an inpainting mask at level i. `blend`: restores it wherever the edit
    does not act; a picture that it finds to be edited as a whole, in light or style, is guided no longer, since its maps
    have to change too. `on_step(step, denoised, x, distance)`: called after every step, with the attention distance [B]
    that was found ahead of it, None where nothing guides it.
    """
    sigmas = [float(s) for s in inversion.sigmas]
    for index in range(inversion.steps, 0, -1):
        step, sigma, sigma_next = inversion.steps - index, sigmas[index], sigmas[index - 1]
        strength = guidance.strength_at(sigma, step, inversion.steps)
        hold = guidance.holds_negative_at(step)
        shift, distance = 0.0, None
        if strength and (blend is None or blend.keeps_some is None or blend.keeps_some.any()):
            reference = reference_maps(index)
            if reference is None:
                reference = passes.record_maps("source", inversion.trajectory[index].to(x), sigma)
            denoised, gradient, distance = passes.denoise_and_match(x, sigma, reference, hold)
            shift = guidance_shift(gradient, sigma, strength * REFERENCE_STEPS / inversion.steps)
        else:
            denoised = passes.denoise(x, sigma, hold)
        if blend is not None:
            blend.observe(passes.contrast(x, sigma), 1 - index / inversion.steps)
            shift = shift if distance is None else shift * blend.keeps_some.to(x)
        shifted = x + shift
        estimate = denoised if distance is None else passes.estimate_elsewhere(denoised, x, shifted, sigma)
        x = ddim.step(shifted, ddim.predicted_eps(shifted, estimate, sigma), sigma, sigma_next)
        if inversion.residuals is not None:
            x = x + inversion.residuals[index - 1].to(x)
        if blend is not None:
            x = blend.keep_source(x, inversion.trajectory[index - 1].to(x))
        x = keep_outside(x, index - 1)
        on_step(step, denoised, x, distance)
    return x


def sample_official(
    inversion: Inversion,
    passes: DenoisingPasses,
    x: torch.Tensor,
    guidance: GuidanceSchedule,
    on_step: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], Any],
    keep_outside: Callable[[torch.Tensor, int], torch.Tensor],
    final_sigma: float,
) -> torch.Tensor:
    """The authors' update (pix2pixzero edit_pipeline.py), step for step.

    It differs from `sample_guided` in four ways. The reference maps come from a reconstruction pass of its own, run
    here in lockstep. Both branches are matched and shifted, each along its own gradient, averaged over the heads of
    both. The UNet's outputs at the two are mixed, but the latent that steps on is the negative one. The last step ends
    on the schedule's first noise level, `final_sigma`, and its latent is returned as if it were clean.
    """
    sigmas = [final_sigma, *(float(s) for s in inversion.sigmas[1:])]
    reference_x = x
    for index in range(inversion.steps, 0, -1):
        step, sigma, sigma_next = inversion.steps - index, sigmas[index], sigmas[index - 1]
        strength = guidance.strength_at(sigma, step, inversion.steps)
        negative_x = positive_x = x
        distance = None
        if strength:
            shifted = {}
            for branch, source_branch in (("negative", "negative"), ("positive", "source")):
                reference = passes.record_maps(source_branch, reference_x, sigma)
                gradient, distance = passes.map_gradient(branch, x, sigma, reference)
                shifted[branch] = x + guidance_shift(gradient / 2, sigma, strength)
            negative_x, positive_x = shifted["negative"], shifted["positive"]
        if guidance.strength:
            reference_denoised = passes.mix_branches(
                passes.denoise_branch("source", reference_x, sigma),
                passes.denoise_branch("negative", reference_x, sigma),
                reference_x,
                sigma,
            )
            reference_eps = ddim.predicted_eps(reference_x, reference_denoised, sigma)
            reference_x = ddim.step(reference_x, reference_eps, sigma, sigma_next)
        positive_denoised = passes.denoise_branch("positive", positive_x, sigma)
        denoised = passes.mix_branches(
            passes.estimate_elsewhere(positive_denoised, positive_x, negative_x, sigma),
            passes.denoise_branch("negative", negative_x, sigma),
            negative_x,
            sigma,
        )
        x = ddim.step(negative_x, ddim.predicted_eps(negative_x, denoised, sigma), sigma, sigma_next)
        if index == 1:
            x = ddim.rescale(x, final_sigma, 0.0)
        x = keep_outside(x, index - 1)
        on_step(step, denoised, x, distance)
    return x
