"""A toy UNet with attention maps in float64, and the guidance loops carried out on it with autograd."""

import weakref

import torch
from pix2pix_zero.editing.guidance import GuidanceSchedule, KeptSource, LocalBlend, attention_distance, sample_guided
from pix2pix_zero.editing.official import sample_official
from pix2pix_zero.editing.trajectory import Inversion
from toy_diffusion import SIGMA, sigmas, timestep_of, vp_scale

STEPS = 5
CFG = 3.0
TEXTS = {"source": 0.2, "positive": 0.9, "negative": -0.4}


def toy_unet(x, text, t):
    """(eps, maps) of one row [C, H, W]: maps [heads, pixels, tokens] that depend on latent, text and timestep."""
    eps = torch.tanh(x * (0.6 + t / 2000) + text) + 0.2 * x.roll(1, -1)
    tokens = torch.linspace(-1, 1, 3, dtype=x.dtype)
    logits = torch.stack([(x.mean(0).flatten()[:, None] + text) * tokens * gain for gain in (1.0, 3.0)])
    return eps, logits.softmax(-1)


class ToyPasses:
    """The protocol, carried out on the toy with autograd; `calls` holds every (evaluation, branch, sigma)."""

    def __init__(self, predicts_v=False):
        self.predicts_v = predicts_v
        self.calls = []

    def _rows(self, branch, x, sigma):
        return [toy_unet(row / vp_scale(sigma), TEXTS[branch], timestep_of(sigma)) for row in x]

    def denoise_branch(self, branch, x, sigma):
        self.calls.append(("denoise", branch, sigma))
        output = torch.stack([eps for eps, _ in self._rows(branch, x, sigma)])
        if self.predicts_v:
            return x / (1 + sigma**2) - output * sigma / vp_scale(sigma)
        return x - sigma * output

    def estimate_elsewhere(self, denoised, x, x_there, sigma):
        return denoised + (x_there - x) / (1 + sigma**2 if self.predicts_v else 1)

    def mix_branches(self, positive, negative, x, sigma):
        return negative + CFG * (positive - negative)

    def denoise(self, x, sigma, hold_negative=False):
        branches = (self.denoise_branch(branch, x, sigma) for branch in ("positive", "negative"))
        return self.mix_branches(*branches, x, sigma)

    def record_maps(self, branch, x, sigma):
        self.calls.append(("record", branch, sigma))
        return {"site": torch.stack([maps for _, maps in self._rows(branch, x, sigma)])}

    def map_gradient(self, branch, x, sigma, reference):
        self.calls.append(("gradient", branch, sigma))
        x = x.detach().requires_grad_(True)
        maps = torch.stack([maps for _, maps in self._rows(branch, x, sigma)])
        distance = attention_distance(maps, reference["site"])
        return torch.autograd.grad(distance.sum(), x)[0], distance.detach()

    def contrast(self, x, sigma):
        edited, source = (self.denoise_branch(branch, x, sigma) for branch in ("positive", "source"))
        return (edited - source).abs().mean(1, keepdim=True)

    def denoise_and_match(self, x, sigma, reference, hold_negative=False):
        return self.denoise(x, sigma, hold_negative), *self.map_gradient("positive", x, sigma, reference)


def inversion(batch=1, steps=STEPS):
    generator = torch.Generator().manual_seed(4)
    levels = sigmas(steps)
    clean = torch.randn(batch, 4, 4, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch, 4, 4, 5, generator=generator, dtype=torch.float64)
    trajectory = torch.stack([clean + level * noise for level in levels])
    return Inversion(trajectory, levels, [], weakref.ref(ToyPasses))


def run(loop, source, passes, strength=None, kept=None, on_step=lambda *step: None, **schedule):
    """By the loop's own step, unless `plain` says otherwise."""
    schedule = {"plain": loop is sample_official} | schedule
    strength = (2.0 if schedule["plain"] else 0.3) if strength is None else strength
    guidance = GuidanceSchedule(strength, final_sigma=float(SIGMA[0]), **schedule)
    return loop(source, passes, source.trajectory[-1], guidance, kept or KeptSource(source), on_step)


def blended(source, passes, blend=None, **options):
    return run(sample_guided, source, passes, kept=KeptSource(source, blend=blend or LocalBlend(0.5)), **options)


def their_gradient(x, t, reference):
    """(the distance of the edited text's maps at a row [C, H, W] from the reference's, its gradient)."""
    leaf = x.clone().requires_grad_(True)
    distance = their_distance(toy_unet(leaf, TEXTS["positive"], t)[1], reference)
    return distance.detach(), torch.autograd.grad(distance, leaf)[0]


def their_distance(maps, reference):
    """Pix2PixZeroL2Loss, maps [heads of the whole batch, pixels, tokens]."""
    return ((maps - reference) ** 2).sum((1, 2)).mean(0)
