"""Cross-attention guidance: denoise along the edited text while the maps of the source picture hold the structure.

pix2pix-zero section 3.3, eq. 4 and Algorithm 1. Where the edit does not act, a local blend keeps the source picture:
Prompt-to-Prompt (Hertz et al. 2022, section 4) blends by the attention maps of the words that differ, DiffEdit (Couairon
et al. 2022, section 3.2) by where the predictions for the two texts differ. Here it is the latter, gathered while the
edit is drawn, since an edit direction moves all words of a text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from .trajectory import DIFFUSION, Inversion, NoisePath

Maps = dict[Any, torch.Tensor]

# What gradient steps do adds up over an edit: strengths are given for the paper's number of steps.
REFERENCE_STEPS = 50

# Of the local blend.
START = 0.1  # share of the steps after which the mask is trusted
PEAK = 0.99
EVERYWHERE = 0.7  # a mask larger than this part of the picture belongs to an edit of the whole: night, another style


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

    `guidance_strength`: in 0..1, the part of the attention distance that a step of 50 is to close, see `distance_step`; if
    `plain`, the paper's lambda instead, the size of its gradient step, see `plain_step`. `first`, `last`: it acts on noise
    levels `last` <= sigma <= `first`. `every`: it acts on one of so many steps, the middle one, for all of them. `share`: in
    0..1, part of the steps in which it acts, from the noisiest on. `holds_negative`: the negative text is evaluated at every
    other step only. `final_sigma`: where `sample_official` ends.
    """

    guidance_strength: float
    plain: bool = False
    first: float = float("inf")
    last: float = 0.0
    every: int = 1
    share: float = 1.0
    holds_negative: bool = False
    final_sigma: float = 0.0

    def strength_at(self, sigma: float, step: int, steps: int) -> float:
        """The part of the distance, or the lambda, of `step`, counted from 0 at the noisiest. 0: no gradient is needed.

        Of n steps in place of 50, each leaves (1 - strength)^(50 / n) of the distance, and lambda is 50 / n times as large.
        """
        turn = step % self.every == min(self.every, steps) // 2
        if not (self.last <= sigma <= self.first and step < self.share * steps and turn):
            return 0.0
        replaced = self.every * REFERENCE_STEPS / steps
        if self.plain:
            return self.guidance_strength * replaced
        return 1 - (1 - self.guidance_strength) ** replaced

    def holds_negative_at(self, step: int) -> bool:
        """Whether the negative text's prediction follows from the step before."""
        return self.holds_negative and step % 2 == 1


def attention_distance(maps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Squared distance of one site's maps, summed over pixels and tokens, averaged over heads (eq. 4): [B].

    `maps`, `reference`: [B, heads, H*W, tokens], rows summing to 1.
    """
    return (maps - reference).square().sum((2, 3)).mean(1)


def logits_gradient(maps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The gradient of `attention_distance(softmax(logits), reference)` with respect to the logits, of their shape.

    That with respect to the maps is 2 (maps - reference) / heads. A softmax takes a gradient g to maps * (g - <g, maps>).
    """
    error = maps - reference
    error -= (error * maps).sum(-1, keepdim=True)
    return error.mul_(maps).mul_(2 / maps.shape[1])


def distance_step(gradient: torch.Tensor, distance: torch.Tensor, part: float, longest: float) -> torch.Tensor:
    """The step down `gradient` that would close `part` of `distance` if the distance were linear: [B, C, H, W].

    -part * distance / |gradient|^2 * gradient: Polyak's step (Minimization of unsmooth functionals, 1969) for a least value
    of 0. It is the same whatever factor the distance has, by the number of sites, heads, pixels or words, and in
    whatever units the latent is. Near a least value above 0 it would grow without bound: its root mean square per picture
    is at most `part * longest`.

    `gradient`: [B, C, H, W] of `distance` [B]. `part`: in 0..1.
    """
    peak = gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    way = gradient / peak  # squares of small gradients would vanish
    size = way.square().sum((1, 2, 3), keepdim=True).sqrt().clamp_min(1.0)
    length = (distance.to(gradient).view(-1, 1, 1, 1) / size / peak).clamp_max(longest * gradient[0].numel() ** 0.5)
    return -part * length * (way / size)


def plain_step(gradient: torch.Tensor, sigma: float, size: float, path: NoisePath = DIFFUSION) -> torch.Tensor:
    """The paper's gradient step (eq. 4) of size lambda on the variance-preserving latent, x / sqrt(1 + sigma^2), written in x."""
    return -size * path.power(sigma) * gradient


OnStep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], Any]
"""`on_step(step, denoised, x, distance)`: called after every step, with the attention distance [B] that was found ahead of
it, None where nothing guides it."""


class LocalBlend:
    """The mask of one edit, which sharpens as it is drawn.

    `threshold`: in 0..1, part of the strongest contrast at which a place counts as edited. `mask`: [B, 1, H, W] in 0..1, 1
    where the edit acts, or None as long as too little is known. `keeps_some` [B, 1, 1, 1]: whether any of a picture is to be
    kept, so far as is known; None before the first step.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.mask: torch.Tensor | None = None
        self.keeps_some: torch.Tensor | None = None
        self._total: torch.Tensor | None = None

    def observe(self, contrast: torch.Tensor, progress: float) -> None:
        """Add a step's contrast [B, 1, H, W]: how far apart edited and source prediction were. `progress`: in 0..1."""
        self._total = contrast if self._total is None else self._total + contrast
        found = edit_mask(self._total, self.threshold)
        self.keeps_some = found.amin((1, 2, 3), keepdim=True) < 1
        if progress >= START:
            self.mask = found

    def keep_source(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """`x` where the edit acts, `source` elsewhere, both [B, C, H, W] at one noise level."""
        return x if self.mask is None else torch.lerp(source, x, self.mask)


def edit_mask(contrast: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where `contrast` [B, 1, H, W] exceeds `threshold` times its peak: [B, 1, H, W] in 0..1.

    The mask rises from 0 at half the threshold to 1 at one and a half. The contrast is smoothed over about a tenth of the
    picture first. The peak is taken per picture, outliers left out. Where nearly all of a picture exceeds it, all does.
    """
    reach = max(1, round(min(contrast.shape[-2:]) / 32))
    padded = F.pad(contrast, (reach,) * 4, mode="replicate")
    smooth = F.avg_pool2d(padded, 2 * reach + 1, stride=1)
    peak = smooth.flatten(1).quantile(PEAK, dim=1).clamp_min(torch.finfo(smooth.dtype).tiny)
    mask = (smooth / peak.view(-1, 1, 1, 1) / threshold - 0.5).clamp(0, 1)
    return torch.where(mask.mean((1, 2, 3), keepdim=True) > EVERYWHERE, 1.0, mask)


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

    An aligned inversion has the evaluations beside those of its own steps, `Inversion.seen_from`, so that an unedited part
    repeats these; a shift is found there, and written at the step's own level. DirectEdit (arXiv 2605.02417) aligns the edit
    so on flow models.
    """
    for step, level in enumerate(range(inversion.steps, 0, -1)):
        seen_level = inversion.seen_level(level)
        sigma, sigma_next, told = (float(inversion.sigmas[i]) for i in (level, level - 1, seen_level))
        seen = inversion.seen_from(x, level)
        strength = guidance.strength_at(sigma, step, inversion.steps)
        if strength and not kept.lets_guide:
            strength = 0.0
        hold = guidance.holds_negative_at(step)
        gradient = distance = None
        if strength:
            reference = reference_maps(inversion, passes, seen_level, x)
            denoised, gradient, distance = passes.denoise_and_match(seen, told, reference, hold)
        else:
            denoised = passes.denoise(seen, told, hold)
        if kept.blend is not None:
            kept.blend.observe(passes.contrast(seen, told), 1 - level / inversion.steps)
        estimate = denoised
        if gradient is not None:
            if guidance.plain:
                shift = plain_step(gradient, told, strength, inversion.path)
            else:
                longest = _moved_by(inversion.path, told, sigma, sigma_next)
                shift = distance_step(gradient, distance, strength, longest)
            shift = kept.guided_part(shift)
            estimate = passes.estimate_elsewhere(denoised, seen, seen + shift, told)
            x, seen = x + inversion.path.rescale(shift, told, sigma), seen + shift
        x = inversion.path.step_by(x, seen, estimate, (told, sigma, sigma_next))
        if inversion.residuals is not None:
            x = x + inversion.residuals[level - 1].to(x)
        x = kept.restore(x, level - 1)
        on_step(step, denoised, x, distance)
    return x


def _moved_by(path: NoisePath, told: float, sigma: float, sigma_next: float) -> float:
    """How far a DDIM step turns a latent whose picture and noise have variance 1: a root mean square, written at `told`."""
    return path.power(told) ** 0.5 * (path.angle(sigma) - path.angle(sigma_next))


def reference_maps(inversion: Inversion, passes: DenoisingPasses, level: int, x: torch.Tensor) -> Maps:
    """The source's maps at a level, as they were kept, or recorded from the stored latent on the device of `x`."""
    kept = None if inversion.maps is None else inversion.maps.get(level, x.device)
    if kept is not None:
        return kept
    return passes.record_maps("source", inversion.trajectory[level].to(x), float(inversion.sigmas[level]))
