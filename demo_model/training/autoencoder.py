"""Stage 2: the autoencoder, without its decoder's fine part. L1 and squared error, latents of unit size, and noise on the
latents so that they are smooth.
"""

import time

import numpy as np
import torch
from safetensors.torch import save_file

from ..autoencoder import LightAutoencoder, psnr
from .optimizer import Trainer
from .parallel import Pace
from .renders import held_out_pixels, to_pixels

LATENT_NOISE = 0.12


def train_autoencoder(rank: int, renders: str, output: str, pace: Pace) -> list[tuple[int, float]]:
    """Returns (step, PSNR in dB) on held-out pictures."""
    torch.manual_seed(1)
    model = LightAutoencoder()
    torch.manual_seed(100 + rank)
    rng = np.random.default_rng(100 + rank)
    pictures = np.load(renders, mmap_mode="r")
    held_out = held_out_pixels(64)
    trainer = Trainer({"autoencoder": model}, matrix_lr=0.02, other_lr=2e-3, ema_decay=0.995, warmup=pace.warmup)
    curve: list[tuple[int, float]] = []
    pace.start()
    reported = -1e9
    while (progress := pace.progress()) < 1:
        x = to_pixels(pictures[np.sort(rng.choice(len(pictures), pace.batch, replace=False))])
        z = model.encode(x)
        error = model.decode_coarse(z + LATENT_NOISE * torch.randn_like(z)) - x
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        loss = (
            0.5 * error.abs().mean()
            + 2 * error.square().mean()
            + 1e-3 * (mean.square().sum() + (std - 1).square().sum())
        )
        trainer.step(loss, progress)
        if rank == 0 and time.monotonic() - reported > 30:
            reported = time.monotonic()
            curve.append((trainer.count, _evaluate(trainer, held_out)))
            _save(trainer, output)
            pace.report(
                f"autoencoder step {trainer.count} minute {progress * pace.minutes:.1f} PSNR {curve[-1][1]:.2f} dB"
            )
    if rank == 0:
        curve.append((trainer.count, _evaluate(trainer, held_out)))
        _save(trainer, output)
        pace.report(f"autoencoder done: {trainer.count} steps, PSNR {curve[-1][1]:.2f} dB")
    return curve


@torch.no_grad()
def _evaluate(trainer: Trainer, held_out: torch.Tensor) -> float:
    model = trainer.ema["autoencoder"]
    return psnr(model.decode_coarse(model.encode(held_out)).clamp(-1, 1), held_out).item()


def _save(trainer: Trainer, output: str) -> None:
    save_file({k: v.contiguous() for k, v in trainer.ema["autoencoder"].state_dict().items()}, output)
