"""Trains the demo's decoder on: `python dev.py train decoder --work FOLDER`. Encoder, UNet and captioner stay as they are.

Writes FOLDER/decoder/weights.safetensors, to be put in the place of the file that ships, its figures, and a sheet of
held-out pictures: the render, before, after.
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SHIPPED = Path(__file__).parent / "weights.safetensors"
SHOWN = 4  # pictures of each style on the sheet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dev.py train decoder", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the results")
    parser.add_argument("--renders", type=int, default=60_000, help="training pictures (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="that render them (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="of training (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="pictures a step (default: 128 on a GPU, else 12)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from .training.decoder import train_decoder
    from .training.renders import render_training_set

    folder = options.work / "decoder"
    folder.mkdir(parents=True, exist_ok=True)
    renders, output = folder / "renders.npy", folder / "weights.safetensors"
    if not renders.exists():
        partial = folder / "partial-renders.npy"
        render_training_set(partial, options.renders, options.processes)
        partial.rename(renders)
    batch = options.batch or (128 if options.device == "cuda" else 12)
    curve = train_decoder(renders, SHIPPED, output, options.minutes, batch, options.device)
    figures = {
        "curve": curve,
        "batch": batch,
        "minutes": options.minutes,
        "psnr": compare(output, folder / "sheet.png"),
    }
    (folder / "decoder.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    logging.info("%s", figures["psnr"])


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
