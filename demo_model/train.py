"""Trains the demo model from nothing: ``python -m pix2pix_zero.demo_model.train --work FOLDER``.

Needs ComfyUI and the pack on the path; ``python dev.py train`` sees to both. Stages whose result is already in the work
folder are skipped, so an interrupted run continues at the stage it was in.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """Sizes of a run. The defaults trained the weights that ship."""

    renders: int = 60_000
    ranks: int = 3
    autoencoder_minutes: float = 12
    autoencoder_batch: int = 12
    diffusion_minutes: float = 90
    diffusion_batch: int = 24
    captioner_minutes: float = 25


def train(work: Path, recipe: Recipe) -> Path:
    """Run the missing stages in ``work`` and return the packed weights file."""
    from .training.autoencoder import train_autoencoder
    from .training.diffusion import encode_renders, train_diffusion
    from .training.packing import pack_weights
    from .training.parallel import run_ranks
    from .training.renders import render_training_set

    work.mkdir(parents=True, exist_ok=True)
    renders, autoencoder, latents = work / "renders.npy", work / "autoencoder.safetensors", work / "latents.safetensors"
    diffusion, captioner, packed = (
        work / "diffusion.safetensors",
        work / "captioner.safetensors",
        work / "weights.safetensors",
    )
    log = str(work / "train.log")

    def stage(result: Path, run) -> None:
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
            recipe.autoencoder_minutes,
            recipe.autoencoder_batch,
            log,
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
            recipe.diffusion_minutes,
            recipe.diffusion_batch,
            log,
        ),
    )
    if importlib.util.find_spec(f"{__package__}.captioner_training") is not None:
        from .captioner_training import train_captioner

        stage(captioner, lambda out: train_captioner(out, minutes=recipe.captioner_minutes))
    pack_weights(diffusion, captioner if captioner.exists() else None, packed)
    return packed


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
        captioner_minutes=Recipe.captioner_minutes / options.shrink,
    )
    logging.info("weights: %s", train(options.work, recipe))


if __name__ == "__main__":
    main()
