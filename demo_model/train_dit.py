"""Trains a demo DiT on the demo's autoencoder and text encoder: `python dev.py train dit --work FOLDER`.

FOLDER/dit gets the latents, the state of the run and the averaged weights in half precision. An interrupted run goes on where
it stopped; it may be given another number of steps.
"""

import argparse
import logging
from dataclasses import fields
from pathlib import Path

import torch

SHIPPED = Path(__file__).parent / "weights.safetensors"


def main(arguments: list[str] | None = None) -> Path:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from .training.dit import Data, Settings, Training, encode_scenes, write_transformer

    defaults = {field.name: field.default for field in fields(Settings)}
    parser = argparse.ArgumentParser(prog="dev.py train dit", description=__doc__)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of the results")
    add("--scenes", type=int, default=20_000, help="training pictures (default: %(default)s)")
    add("--steps", type=int, default=defaults["steps"], help="default: %(default)s")
    add("--batch", type=int, default=defaults["batch"], help="latents a step (default: %(default)s)")
    add("--rate", type=float, default=defaults["rate"], help="Adam's; Muon's is ten times that (default: %(default)s)")
    add("--seed", type=int, default=defaults["seed"], help="default: %(default)s")
    add("--half", action="store_true", help="bf16 in the matrix products, for CPUs that multiply in it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = options.work / "dit"
    folder.mkdir(parents=True, exist_ok=True)
    latents, output = folder / "latents.npy", folder / "dit.safetensors"
    if not latents.exists():
        encode_scenes(SHIPPED, latents, options.scenes)
    chosen = {name: getattr(options, name) for name in ("steps", "batch", "rate", "seed", "half")}
    run = Training(Data.load(latents, SHIPPED), Settings(**chosen), folder / "state.safetensors")
    run.run(lambda run: write_transformer(run.average, SHIPPED, output))
    return output


if __name__ == "__main__":
    main()
