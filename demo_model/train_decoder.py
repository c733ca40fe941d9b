"""Trains the demo's decoder on: `python dev.py train decoder --work FOLDER`. Encoder, UNet and captioner stay as they are.

Writes FOLDER/decoder/weights.safetensors, to be put in the place of the file that ships, its figures, and a sheet of
held-out pictures: the render, before, after. An interrupted run goes on where it stopped; it may be given another number of
steps.
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

SHIPPED = Path(__file__).parent / "weights.safetensors"
SHOWN = 4  # pictures of each style on the sheet


def main(arguments: list[str] | None = None) -> None:
    from .training.decoder import Settings, load_autoencoder, train_decoder
    from .training.parallel import run_ranks
    from .training.renders import render_training_set

    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="dev.py train decoder", description=__doc__)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of the results")
    add("--renders", type=int, default=30_000, help="training pictures (default: %(default)s)")
    add("--processes", type=int, default=2, help="that render, and without a GPU train (default: %(default)s)")
    add("--steps", type=int, default=Settings.steps, help="default: %(default)s")
    add("--batch", type=int, help=f"pictures a step of each process (default: 128 on a GPU, else {Settings.batch})")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    folder = options.work / "decoder"
    folder.mkdir(parents=True, exist_ok=True)
    renders, start, result = folder / "renders.npy", folder / "start.safetensors", folder / "autoencoder.safetensors"
    if not renders.exists():
        partial = folder / "partial-renders.npy"
        render_training_set(partial, options.renders, options.processes, hard_styles=True)
        partial.rename(renders)
    save_file(load_autoencoder(SHIPPED).state_dict(), start)
    settings = Settings(options.steps, options.batch or (128 if on_gpu else Settings.batch))
    state = folder / "state.safetensors"
    places = (str(start), str(renders), str(state), str(result))
    run_ranks(train_decoder, 1 if on_gpu else options.processes, *places, settings)
    output = folder / "weights.safetensors"
    write_weights(result, output)
    figures = {"steps": settings.steps, **settings.fixed(), "psnr": compare(output, folder / "sheet.png")}
    (folder / "decoder.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    logging.info("%s", figures["psnr"])


def write_weights(autoencoder: Path, output: Path) -> None:
    """The shipped file with another autoencoder."""
    from .training.packing import AUTOENCODER_PREFIX, packed_autoencoder

    tensors = {k: v for k, v in load_file(SHIPPED).items() if not k.startswith(AUTOENCODER_PREFIX)}
    save_file({**tensors, **packed_autoencoder(load_file(autoencoder))}, output)


def compare(output: Path, sheet: Path) -> dict[str, dict[str, float]]:
    """PSNR in dB of held-out pictures of each style, before and after; draws the sheet."""
    from .autoencoder import psnr
    from .training.decoder import held_out_by_style, load_autoencoder, reconstruct

    networks = {"before": load_autoencoder(SHIPPED), "after": load_autoencoder(output)}
    found, rows = {}, []
    for style, pixels in held_out_by_style(64).items():
        results = {name: reconstruct(network, pixels) for name, network in networks.items()}
        found[style] = {name: round(psnr(result, pixels).item(), 2) for name, result in results.items()}
        for pictures in (pixels, *results.values()):
            shown = ((pictures[:SHOWN].movedim(1, -1) + 1) * 127.5).round().byte().numpy()
            rows.append(np.concatenate(shown, 1))
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(sheet)
    return found


if __name__ == "__main__":
    main()
