"""How good is the demo model itself? `python dev.py bench model`

On held-out seeds: the autoencoder's PSNR, the PSNR after inversion and reconstruction, and whether pictures drawn from noise
show what their prompt asks for. Writes a contact sheet to demo_output/.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from comfy.cli_args import args as host_options
from PIL import Image

host_options.cpu = not torch.cuda.is_available()  # before anything of ComfyUI that looks for a device

import comfy.utils  # noqa: E402
from pix2pix_zero.benchmarks.judge import Judge, load_judge  # noqa: E402
from pix2pix_zero.demo_model.loader import WEIGHTS, load_demo_model  # noqa: E402
from pix2pix_zero.demo_model.scene import Scene, sample_scene  # noqa: E402
from pix2pix_zero.demo_model.scene_captions import caption  # noqa: E402
from pix2pix_zero.demo_model.scene_renders import render  # noqa: E402
from pix2pix_zero.demo_model.transformer import TRANSFORMER_WEIGHTS, load_transformer  # noqa: E402
from pix2pix_zero.editing.metrics import peak_signal_to_noise  # noqa: E402
from pix2pix_zero.editing.regularization import NoiseRegularization  # noqa: E402
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit  # noqa: E402
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent  # noqa: E402

import nodes as host_nodes  # noqa: E402

FIRST_SEED = 300_000
OUTPUT = Path(__file__).resolve().parent.parent / "demo_output"

PROMPTS = [
    Scene("cat", "orange"),
    Scene("dog", "gray"),
    Scene("horse", "brown", winter=True),
    Scene("zebra"),
    Scene("cat", "white", glasses=True, night=True),
    Scene("dog", "black", glasses=True, winter=True),
    Scene("dog", "orange", night=True, winter=True),
    Scene("cat", "gray", winter=True, style="pencil sketch"),
    Scene("dog", "brown", glasses=True, style="oil pastel"),
    Scene("zebra", night=True, style="oil pastel"),
]
ASKED = ("subject", "fur", "glasses", "night", "winter", "style")


def asked(scene: Scene) -> list[str]:
    """The attributes that the canonical caption of `scene` names."""
    colourless = scene.subject == "zebra" or scene.style == "pencil sketch"
    return [name for name in ASKED if not (name == "fur" and colourless)]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over pictures [B, H, W, 3] in 0..1, in dB."""
    return peak_signal_to_noise((a - b).square().mean((1, 2, 3))).mean().item()


def pictures(scenes: list[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).float() / 255


class Sampling(NamedTuple):
    """The knobs of ComfyUI's KSampler, in its order."""

    steps: int
    cfg: float
    sampler: str
    scheduler: str


class Model:
    def __init__(self, weights: Path, transformer: Path | None = None):
        self.model, self.clip, self.vae = load_demo_model(weights)
        if transformer is not None:
            self.model = load_transformer(transformer)

    def encode(self, texts: list[str]) -> list:
        rows = [host_nodes.CLIPTextEncode().encode(self.clip, text)[0][0] for text in texts]
        pooled = torch.cat([row[1]["pooled_output"] for row in rows])
        return [[torch.cat([row[0] for row in rows]), {"pooled_output": pooled}]]

    def draw(self, text: str, count: int, seed: int, sampling: Sampling) -> torch.Tensor:
        latent = {"samples": torch.zeros(count, 4, 16, 16)}
        drawn = host_nodes.common_ksampler(self.model, seed, *sampling, self.encode([text]), self.encode([""]), latent)[
            0
        ]
        return self.vae.decode(drawn["samples"])

    def reconstruct(self, images: torch.Tensor, texts: list[str], steps: int, regularization) -> torch.Tensor:
        described, latent = self.encode(texts), {"samples": self.vae.encode(images)}
        inversion = invert_latent(self.model, described, latent, InversionSettings(steps, 0, regularization, "ddim"))
        return self.vae.decode(sample_edit(self.model, inversion, described, described, EditSettings(1.0, 0.0))[0])


def count_answers(judge: Judge, scene: Scene, drawn: torch.Tensor) -> dict[str, float]:
    answers = judge.answers(drawn)
    return {n: sum(a == getattr(scene, n) for a in answers[n]) / len(drawn) for n in asked(scene)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench model", description=__doc__)
    parser.add_argument("--samples", type=int, default=64, help="pictures per prompt")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--scenes", type=int, default=32, help="pictures to invert and reconstruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--scheduler", default="normal")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--dit",
        type=Path,
        nargs="?",
        const=TRANSFORMER_WEIGHTS,
        metavar="FILE",
        help="the transformer in the place of the UNet: that of the pack, or what `dev.py train dit` wrote",
    )
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    comfy.utils.set_progress_bar_enabled(False)
    model, judge = Model(options.weights, options.dit), load_judge()

    held_out = pictures([sample_scene(FIRST_SEED + k) for k in range(256)])
    print(f"autoencoder, 256 scenes: {psnr(model.vae.decode(model.vae.encode(held_out)), held_out):.2f} dB")
    if options.scenes:
        scenes = [sample_scene(FIRST_SEED + k) for k in range(options.scenes)]
        images, texts = pictures(scenes), [caption(scene) for scene in scenes]
        print(
            f"autoencoder, {options.scenes} scenes: {psnr(model.vae.decode(model.vae.encode(images)), images):.2f} dB"
        )
        for name, weight in (("without regularization", 0.0), ("regularized by 20", 20.0)):
            regularization = NoiseRegularization(weight, weight, 5, 5)
            decoded = model.reconstruct(images, texts, 50, regularization)
            print(f"inverted and reconstructed in 50 steps, {name}: {psnr(decoded, images):.2f} dB", flush=True)

    rows, sampling = [], Sampling(options.steps, options.cfg, options.sampler, options.scheduler)
    for index, scene in enumerate(PROMPTS[: options.prompts]):
        start = time.perf_counter()
        drawn = model.draw(caption(scene), options.samples, 1000 * index, sampling)
        figures = count_answers(judge, scene, drawn)
        told = ", ".join(f"{name} {share:.2f}" for name, share in figures.items())
        print(f"{caption(scene)}: {told} ({time.perf_counter() - start:.0f} s)", flush=True)
        rows.append(torch.cat(list(drawn[:10]), dim=1))
    OUTPUT.mkdir(exist_ok=True)
    sheet = OUTPUT / "bench_model.png"
    Image.fromarray((torch.cat(rows).clamp(0, 1) * 255).round().byte().numpy()).save(sheet)
    print(f"wrote {sheet.relative_to(OUTPUT.parent)}: ten pictures per prompt")


if __name__ == "__main__":
    sys.exit(main())
