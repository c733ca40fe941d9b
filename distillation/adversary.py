"""The adversary that makes a student a conditional GAN: it tells (source, the teacher's edit) from (source, the student's).

The relativistic loss with both gradient penalties of Huang et al., "The GAN is dead; long live the GAN!" (NeurIPS 2024), on
patches as in pix2pix (Isola et al., CVPR 2017), written from the papers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .processes import average_gradients

WIDTHS = (32, 64, 96)
PENALTY = 1.0  # of R1 and R2 each, per patch
BETAS = (0.0, 0.99)
BEGINS = 0.3  # of the training: before that the student is told where things are by the pixels alone


class PatchDiscriminator(nn.Module):
    """Scores [B, 1, H/8, W/8] of sources and pictures [B, 3, H, W] in 0..1: higher looks more like a teacher's edit."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS):
        super().__init__()
        layers: list[nn.Module] = []
        before = 6
        for width in widths:
            layers += [nn.Conv2d(before, width, 4, 2, 1), nn.LeakyReLU(0.2)]
            before = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 3, 1, 1))

    def forward(self, sources: Tensor, pictures: Tensor) -> Tensor:
        return self.layers(2 * torch.cat([sources, pictures], 1) - 1)


class Adversary:
    """A discriminator and its optimizer. `sharpness`: its part of the student's gradient beside that of the other losses."""

    def __init__(self, sharpness: float, learning_rate: float, seed: int, device: torch.device):
        self.sharpness, self.device = sharpness, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.discriminator = PatchDiscriminator().to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), learning_rate, BETAS)
        self.optimizer.param_groups[0]["peak"] = learning_rate

    def toward_teacher(self, source: Tensor, output: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        """The student's adversarial loss, so weighted that its gradient in `output` is `sharpness` times that of `loss`.

        Pictures [B, 3, H, W] in 0..1; `loss` is a scalar that was made of `output`.
        """
        with torch.no_grad():
            wanted = self.discriminator(source, target)
        own = F.softplus(wanted - self.discriminator(source, output)).mean()
        (others,) = torch.autograd.grad(loss, output, retain_graph=True)
        (gradient,) = torch.autograd.grad(own, output, retain_graph=True)
        return self.sharpness * others.norm() / gradient.norm().clamp_min(1e-12) * own

    def learn(self, source: Tensor, output: Tensor, target: Tensor, rate: float) -> None:
        """One step of the discriminator at `rate` of its learning rate, on what `toward_teacher` was given."""
        self.compare(source, output, target)
        self.descend(rate)

    def compare(self, source: Tensor, output: Tensor, target: Tensor) -> None:
        """The first half of that: the discriminator's gradient."""
        pictures = [picture.detach().requires_grad_() for picture in (target, output)]
        real, made = (self.discriminator(source, picture) for picture in pictures)
        slopes = torch.autograd.grad(real.sum() + made.sum(), pictures, create_graph=True)
        penalty = sum(slope.square().sum() for slope in slopes) / real.numel()
        loss = F.softplus(made - real).mean() + PENALTY / 2 * penalty
        self.discriminator.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.discriminator)

    def descend(self, rate: float) -> None:
        """The second half."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.step()
