"""The decoder alone, trained on with the encoder as it is: latents keep their meaning, pictures get sharper."""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ...editing.writing import write_whole
from ..autoencoder import LightAutoencoder, psnr
from ..eight_bits import unpacked
from ..scene import STYLES, sample_scene
from ..scene_renders import render
from .optimizer import Trainer, cooled
from .packing import AUTOENCODER_PREFIX
from .renders import to_pixels

log = logging.getLogger("pix2pix_zero.decoder")
LATENT_NOISE = 0.06  # at most: what the UNet draws is not exactly what the encoder writes
EDGES = 0.25  # weight of the difference between neighbouring pixels, where fringes show
SQUARES = 10.0  # weight of the squared error, which is what dB measure, beside half of the absolute one
FIRST_HELD_OUT = 300_000
SAVE_EVERY = 60.0  # seconds
SAY_EVERY = 120.0


@dataclass(frozen=True)
class Settings:
    """How the decoder is trained: `batch` pictures a step on each rank. A run may go on with another number of `steps`."""

    steps: int = 10_000
    batch: int = 4
    matrix_rate: float = 0.005
    other_rate: float = 1e-3
    average: float = 0.998
    seed: int = 0

    def fixed(self) -> dict[str, object]:
        """What a run keeps when it goes on."""
        return {name: value for name, value in asdict(self).items() if name != "steps"}


def load_autoencoder(weights: Path) -> LightAutoencoder:
    """The autoencoder in a file of the demo model."""
    prefix = AUTOENCODER_PREFIX
    tensors = {k.removeprefix(prefix): v for k, v in load_file(weights).items() if k.startswith(prefix)}
    network = LightAutoencoder()
    network.load_state_dict({k: v.float() for k, v in unpacked(tensors).items()})
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


class Training:
    """A run on uint8 pictures [N, 128, 128, 3] in `renders`, from the decoder of `network` or from `checkpoint`.

    What a step draws depends on the seed, the rank and the step's number alone, so that an interrupted run goes on to the
    same weights.
    """

    def __init__(
        self, network: LightAutoencoder, renders: Path, checkpoint: Path, settings: Settings, rank: int = 0
    ) -> None:
        self.network, self.checkpoint, self.settings, self.rank = network, checkpoint, settings, rank
        network.encoder.requires_grad_(False)
        self.pictures = np.load(renders, mmap_mode="r")
        self.trainer = Trainer(
            {"decoder": network.decoder},
            settings.matrix_rate,
            settings.other_rate,
            settings.average,
        )
        self.trainer.schedule = cooled
        self.device = next(network.parameters()).device
        if checkpoint.is_file():
            self._read()

    def averaged(self) -> LightAutoencoder:
        """The autoencoder with the decoder's running average, which is what is kept."""
        network = LightAutoencoder()
        decoder = {f"decoder.{k}": v for k, v in self.trainer.ema["decoder"].state_dict().items()}
        network.load_state_dict({**self.network.state_dict(), **decoder})
        return network.to(self.device)

    def one_step(self) -> None:
        """Draw a batch and step the decoder."""
        settings, count = self.settings, self.trainer.count
        rng = np.random.default_rng((settings.seed, self.rank, count))
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        chosen = np.sort(rng.integers(len(self.pictures), size=settings.batch))
        x = to_pixels(self.pictures[chosen])
        share = LATENT_NOISE * torch.rand(len(x), 1, 1, 1, generator=generator)
        noise = share * torch.randn(len(x), 4, x.shape[2] // 8, x.shape[3] // 8, generator=generator)
        x = x.to(self.device)
        with torch.no_grad():
            z = self.network.encode(x) + noise.to(self.device)
        error = self.network.decode(z) - x
        loss = 0.5 * error.abs().mean() + SQUARES * error.square().mean() + EDGES * edge_error(error)
        self.trainer.step(loss, count / settings.steps)

    def run(self, held_out: dict[str, Tensor]) -> None:
        """Train to the end. The first rank tells how pictures of each style are reconstructed, and saves."""
        held_out = {style: pixels.to(self.device) for style, pixels in held_out.items()}
        begin = saved = time.monotonic()
        said, first = begin - SAY_EVERY, self.trainer.count
        while self.trainer.count < self.settings.steps:
            self.one_step()
            now = time.monotonic()
            if self.rank == 0 and now - said > SAY_EVERY:
                said, pace = now, (self.trainer.count - first) / (now - begin)
                network = self.averaged()
                found = {s: round(psnr(reconstruct(network, x), x).item(), 2) for s, x in held_out.items()}
                log.info("step %d, %.2f a second, dB: %s", self.trainer.count, pace, found)
            if self.rank == 0 and now - saved > SAVE_EVERY:
                saved = now
                self.save()
        if self.rank == 0:
            self.save()

    def save(self) -> None:
        """Write everything that the next step depends on, whole or not at all."""
        write_whole(self.checkpoint, save(self.trainer.state(), {"settings": json.dumps(self.settings.fixed())}))

    def _read(self) -> None:
        with safe_open(self.checkpoint, "pt") as file:
            begun = json.loads(file.metadata()["settings"])
        changed = {k: v for k, v in self.settings.fixed().items() if begun.get(k) != v}
        if changed:
            raise ValueError(
                f"{self.checkpoint} was begun with other settings: {changed}. Train with those, or in another folder."
            )
        self.trainer.restore(load_file(self.checkpoint))


def train_decoder(rank: int, start: str, renders: str, checkpoint: str, output: str, settings: Settings) -> None:
    """Train the decoder of the autoencoder's weights in `start`, and write them with it to `output`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # in a rank's own process
    network = LightAutoencoder()
    network.load_state_dict(load_file(start))
    if torch.cuda.is_available():
        network = network.cuda()
    training = Training(network, Path(renders), Path(checkpoint), settings, rank)
    training.run(held_out_by_style(24) if rank == 0 else {})
    if rank == 0:
        state = training.averaged().state_dict()
        write_whole(Path(output), save({k: v.cpu().contiguous() for k, v in state.items()}))
