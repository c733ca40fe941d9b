"""Trains the demo model from nothing: `python -m pix2pix_zero.demo_model.train --work FOLDER`.

Needs ComfyUI and the pack on the path; `python dev.py train` sees to both. Stages whose result is already in the work
folder are skipped, so an interrupted run continues at the stage it was in.
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Recipe:
    """Sizes of a run. The defaults trained the weights that ship."""

    renders: int = 60_000
    ranks: int = 3
    autoencoder_minutes: float = 12
    autoencoder_batch: int = 12
    decoder_renders: int = 30_000
    decoder_steps: int = 10_000
    decoder_batch: int = 4
    diffusion_minutes: float = 90
    diffusion_batch: int = 24
    warmup: int = 60
    captioner_renders: int = 24_000
    captioner_steps: int = 1500


def train(work: Path, recipe: Recipe) -> Path:
    """Run the missing stages in `work` and return the packed weights file."""
    from .training.autoencoder import train_autoencoder
    from .training.decoder import Settings, train_decoder
    from .training.diffusion import encode_renders, train_diffusion
    from .training.packing import pack_weights
    from .training.parallel import Pace, run_ranks
    from .training.renders import render_training_set

    work.mkdir(parents=True, exist_ok=True)
    renders, autoencoder, latents = work / "renders.npy", work / "autoencoder.safetensors", work / "latents.safetensors"
    diffusion, captioner, packed = (
        work / "diffusion.safetensors",
        work / "captioner.safetensors",
        work / "weights.safetensors",
    )
    hard, decoder = work / "renders-of-hard-styles.npy", work / "decoder.safetensors"
    log = str(work / "train.log")

    def stage(result: Path, run: Callable[[Path], None]) -> None:
        if result.exists():
            logging.info("%s is there: stage skipped", result.name)
            return
        partial = result.with_name(f"partial-{result.name}")
        run(partial)
        partial.rename(result)

    stage(renders, lambda out: render_training_set(out, recipe.renders, recipe.ranks))
    stage(
        autoencoder,
        lambda out: run_ranks(
            train_autoencoder,
            recipe.ranks,
            str(renders),
            str(out),
            Pace(recipe.autoencoder_minutes, recipe.autoencoder_batch, recipe.warmup, log),
        ),
    )
    stage(latents, lambda out: encode_renders(str(renders), str(autoencoder), str(out)))
    stage(
        diffusion,
        lambda out: run_ranks(
            train_diffusion,
            recipe.ranks,
            str(latents),
            str(autoencoder),
            str(out),
            Pace(recipe.diffusion_minutes, recipe.diffusion_batch, recipe.warmup, log),
        ),
    )
    stage(hard, lambda out: render_training_set(out, recipe.decoder_renders, recipe.ranks, hard_styles=True))
    stage(
        decoder,
        lambda out: run_ranks(
            train_decoder,
            recipe.ranks,
            str(autoencoder),
            str(hard),
            str(work / "decoder-state.safetensors"),
            str(out),
            Settings(recipe.decoder_steps, recipe.decoder_batch),
        ),
    )
    stage(captioner, lambda out: _train_captioner(renders, out, recipe))
    pack_weights(diffusion, decoder, captioner, packed)
    return packed


def _train_captioner(renders: Path, output: Path, recipe: Recipe) -> None:
    from .captioner_training import train_captioner
    from .training.renders import training_scene

    torch.set_num_threads(1)
    pictures = np.load(renders, mmap_mode="r")[: recipe.captioner_renders]
    scenes = [training_scene(index) for index in range(len(pictures))]
    weights, _ = train_captioner(torch.from_numpy(np.array(pictures)), scenes, recipe.captioner_steps)
    save_file(weights, output)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for renders, logs and weights (about 4 GB)")
    parser.add_argument("--ranks", type=int, default=Recipe.ranks, help="processes, each with one thread")
    parser.add_argument(
        "--shrink", type=float, default=1.0, help="divide every size and time by this, to try the recipe"
    )
    options = parser.parse_args()

    recipe = Recipe(
        renders=max(300, int(Recipe.renders / options.shrink)),
        ranks=options.ranks,
        autoencoder_minutes=Recipe.autoencoder_minutes / options.shrink,
        diffusion_minutes=Recipe.diffusion_minutes / options.shrink,
        decoder_renders=max(300, int(Recipe.decoder_renders / options.shrink)),
        decoder_steps=max(60, int(Recipe.decoder_steps / options.shrink)),
        captioner_steps=max(100, int(Recipe.captioner_steps / options.shrink)),
    )
    logging.info("weights: %s", train(options.work, recipe))


if __name__ == "__main__":
    main()
