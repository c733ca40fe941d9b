"""The decoder alone, trained on with the encoder as it is: latents keep their meaning, pictures get sharper."""

import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..autoencoder import LightAutoencoder, psnr
from ..scene import STYLES, sample_scene
from ..scene_renders import render
from .optimizer import Trainer
from .renders import to_pixels

AUTOENCODER = "first_stage_model."
LATENT_NOISE = 0.06  # at most: what the UNet draws is not exactly what the encoder writes
EDGES = 0.25  # weight of the difference between neighbouring pixels, where fringes show
FIRST_HELD_OUT = 300_000
SEED = 0
SAY_EVERY = 20.0  # seconds


def load_autoencoder(weights: Path) -> LightAutoencoder:
    """The autoencoder in a file of the demo model."""
    tensors = {
        k.removeprefix(AUTOENCODER): v.float() for k, v in load_file(weights).items() if k.startswith(AUTOENCODER)
    }
    network = LightAutoencoder()
    network.load_state_dict(tensors)
    return network


def held_out_by_style(count: int) -> dict[str, Tensor]:
    """`count` pictures of each style that no stage trains on, [count, 3, 128, 128] in -1..1."""
    found: dict[str, list[np.ndarray]] = {style: [] for style in STYLES}
    seed = FIRST_HELD_OUT
    while any(len(pictures) < count for pictures in found.values()):
        scene = sample_scene(seed)
        if len(found[scene.style]) < count:
            found[scene.style].append(render(scene))
        seed += 1
    return {style: to_pixels(np.stack(pictures)) for style, pictures in found.items()}


@torch.no_grad()
def reconstruct(network: LightAutoencoder, pixels: Tensor) -> Tensor:
    """Pictures through encoder and decoder, [B, 3, H, W] in -1..1."""
    return network.decode(network.encode(pixels)).clamp(-1, 1)


def edge_error(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbours in an error [B, C, H, W], along both sides."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def train_decoder(renders: Path, weights: Path, output: Path, minutes: float, batch: int, device: str):
    """Train for `minutes` on uint8 pictures [N, 128, 128, 3]; write `weights` with the new decoder to `output`.

    Returns (step, PSNR in dB of the held-out pictures of all styles) for every line of the log.
    """
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    network = load_autoencoder(weights).to(device)
    network.encoder.requires_grad_(False)
    pictures = torch.from_numpy(np.load(renders)).to(device)
    with torch.no_grad():
        latents = torch.cat([network.encode(_pixels(part)) for part in pictures.split(512)])
    held_out = torch.cat(list(held_out_by_style(48).values())).to(device)
    trainer = Trainer({"decoder": network.decoder}, matrix_lr=0.01, other_lr=1e-3, ema_decay=0.999)
    curve, start, said = [], time.monotonic(), -math.inf

    def say() -> None:
        averaged = LightAutoencoder().to(device)
        averaged.load_state_dict({**network.state_dict(), **_decoder(trainer)})
        curve.append((trainer.count, psnr(reconstruct(averaged, held_out), held_out).item()))
        logging.info("decoder step %d, %.0f s, PSNR %.2f dB", trainer.count, time.monotonic() - start, curve[-1][1])
        _write(weights, output, trainer)

    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        chosen = torch.from_numpy(rng.integers(len(pictures), size=batch)).to(device)
        x, z = _pixels(pictures[chosen]), latents[chosen]
        noise = LATENT_NOISE * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(z)
        error = network.decode(z + noise) - x
        loss = 0.5 * error.abs().mean() + 2 * error.square().mean() + EDGES * edge_error(error)
        trainer.step(loss, progress)
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            say()
    say()
    return curve


def _pixels(pictures: Tensor) -> Tensor:
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def _decoder(trainer: Trainer) -> dict[str, Tensor]:
    return {f"decoder.{name}": value for name, value in trainer.ema["decoder"].state_dict().items()}


def _write(weights: Path, output: Path, trainer: Trainer) -> None:
    tensors = load_file(weights)
    for name, value in _decoder(trainer).items():
        old = tensors[AUTOENCODER + name]
        tensors[AUTOENCODER + name] = value.to("cpu", old.dtype).contiguous()
    save_file(tensors, output)
