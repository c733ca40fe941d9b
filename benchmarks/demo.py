"""How good are the edits of the demo scenes, against their ground truth? `python dev.py bench demo`

Edits held-out scenes with the nodes' default settings, beside the same edit without guidance and a plain word swap on the
same inversion, and writes a table and a contact sheet to demo_output/.
"""

import argparse
import inspect
import logging
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from comfy.cli_args import args as host_options
from PIL import Image

host_options.cpu = not torch.cuda.is_available()  # before anything of ComfyUI that looks for a device

from pix2pix_zero.benchmarks.judge import Judge, load_judge  # noqa: E402
from pix2pix_zero.demo_model.loader import WEIGHTS, load_demo_model  # noqa: E402
from pix2pix_zero.demo_model.scene import render, sample_scene, subject_mask  # noqa: E402
from pix2pix_zero.editing.local_blend import LocalBlend  # noqa: E402
from pix2pix_zero.editing.regularization import NoiseRegularization  # noqa: E402
from pix2pix_zero.host.captioner import load_demo_captioner  # noqa: E402
from pix2pix_zero.host.sampling import invert_latent, sample_edit  # noqa: E402
from pix2pix_zero.nodes.directions import Pix2PixZeroApplyDirection, Pix2PixZeroEditDirection  # noqa: E402
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion  # noqa: E402
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler  # noqa: E402

import nodes as host_nodes  # noqa: E402

FIRST_SEED = 100_000  # below the training seeds; the first hundred are looked at while developing
OUTPUT = Path(__file__).resolve().parent.parent / "demo_output"


@dataclass(frozen=True)
class SceneEdit:
    """One concept edit of the demo's world and how to see that it was made."""

    source: str
    target: str
    before: dict
    after: dict

    @property
    def question(self) -> str:
        return next(iter(self.after))


EDITS = {
    "cat2dog": SceneEdit("cat", "dog", {"subject": "cat"}, {"subject": "dog"}),
    "horse2zebra": SceneEdit("horse", "zebra", {"subject": "horse"}, {"subject": "zebra"}),
    "day2night": SceneEdit("day", "night", {"night": False}, {"night": True}),
    "summer2winter": SceneEdit("summer", "winter", {"winter": False}, {"winter": True}),
}


@dataclass(frozen=True)
class Scenes:
    """Source pictures and their ground truth, [B, H, W, 3] in 0..1, and `outside` [B, H, W, 1], 1 where none may change."""

    sources: torch.Tensor
    truths: torch.Tensor
    outside: torch.Tensor


def draw_scenes(edit: SceneEdit, count: int, first_seed: int = FIRST_SEED) -> Scenes:
    before = [sample_scene(first_seed + i, **edit.before) for i in range(count)]
    after = [replace(scene, **edit.after) for scene in before]
    union = np.stack([subject_mask(a) | subject_mask(b) for a, b in zip(before, after)])
    dilated = F.max_pool2d(torch.from_numpy(union)[:, None].float(), 9, 1, 4)
    return Scenes(_pictures(before), _pictures(after), 1 - dilated.movedim(1, -1))


def _pictures(scenes: list) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).float() / 255


def node_default(node_class: type, socket: str):
    """The default value that a node shows for one of its inputs."""
    return next(item.default for item in node_class.define_schema().inputs if item.id == socket)


class Bench:
    """The loaded demo model and one inversion of the scenes; `redraw` is the only thing that differs between rows."""

    def __init__(self, edit: SceneEdit, scenes: Scenes, steps: int, weights: Path):
        self.edit, self.scenes = edit, scenes
        self.model, self.clip, self.vae = load_demo_model(weights)
        self.captions = load_demo_captioner(weights).caption(scenes.sources)
        self.described = self.encode(self.captions)
        self.reconstructed_source, self.reconstructed_truth = map(self.through_vae, (scenes.sources, scenes.truths))
        latent = {"samples": self.vae.encode(scenes.sources)}
        values = {name: node_default(Pix2PixZeroInversion, name) for name in _settings(Pix2PixZeroInversion.invert)}
        regularization = NoiseRegularization(
            values["autocorrelation_weight"],
            values["kl_weight"],
            values["regularization_steps"],
            values["autocorrelation_rolls"],
        )
        start = time.perf_counter()
        self.inversion = invert_latent(
            self.model, self.described, latent, steps or values["steps"], 0, regularization, values["method"]
        )
        self.seconds = time.perf_counter() - start
        (self.direction,) = Pix2PixZeroEditDirection.execute(self.clip, edit.source, edit.target).result

    def encode(self, texts: list[str]) -> list:
        rows = [host_nodes.CLIPTextEncode().encode(self.clip, text)[0][0] for text in texts]
        return [[torch.cat([row[0] for row in rows]), {}]]

    def through_vae(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(self.vae.encode(pictures))

    def moved(self, strength: float = 1.0) -> list:
        return Pix2PixZeroApplyDirection.execute(self.described, self.direction, strength).result[0]

    def word_swap(self) -> list:
        return self.encode([text.replace(self.edit.source, self.edit.target) for text in self.captions])

    def redraw(self, positive: list, cfg: float, strength: float, blend: float = 0.0, **options) -> torch.Tensor:
        blend = LocalBlend(blend) if blend else None
        samples = sample_edit(
            self.model, self.inversion, positive, self.described, cfg, strength, blend=blend, **options
        )
        return self.vae.decode(samples)

    def reconstruct(self) -> torch.Tensor:
        """The unedited picture by plain DDIM, without the residuals that would bring it back exactly."""
        plain = replace(self.inversion, residuals=None)
        return self.vae.decode(sample_edit(self.model, plain, self.described, self.described, 1.0, 0.0))


def _settings(function) -> list[str]:
    return [
        name for name in inspect.signature(function).parameters if name not in ("model", "positive", "latent_image")
    ]


def score(bench: Bench, judge: Judge, pictures: torch.Tensor) -> dict[str, float]:
    """Figures of one row: share judged edited, and mean absolute errors on the 0 to 255 scale."""
    outside = bench.scenes.outside
    question, wanted = next(iter(bench.edit.after.items()))
    background = ((pictures - bench.reconstructed_source).abs() * outside).sum() / (3 * outside.sum())
    return {
        "edited": sum(answer == wanted for answer in judge.answers(pictures)[question]) / len(pictures),
        "background": 255 * background.item(),
        "whole": 255 * (pictures - bench.reconstructed_truth).abs().mean().item(),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench demo", description=__doc__)
    parser.add_argument("--edit", choices=EDITS, default="cat2dog")
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--steps", type=int, default=0, help="default: the node's")
    parser.add_argument("--cfg", type=float, nargs="*", default=[node_default(Pix2PixZeroKSampler, "cfg")])
    parser.add_argument(
        "--strength", type=float, nargs="*", default=[0.0, node_default(Pix2PixZeroKSampler, "guidance_strength")]
    )
    parser.add_argument(
        "--blend", type=float, nargs="*", default=[0.0, node_default(Pix2PixZeroKSampler, "local_blend")]
    )
    parser.add_argument("--preset", default=node_default(Pix2PixZeroKSampler, "preset"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)

    edit = EDITS[options.edit]
    bench = Bench(edit, draw_scenes(edit, options.scenes, options.first_seed), options.steps, options.weights)
    judge = load_judge()
    print(f"{options.edit}, {options.scenes} scenes, {bench.inversion.steps} steps, inverted in {bench.seconds:.0f} s")
    print(f"e.g. {bench.captions[0]!r}")
    print(f"{'':48s} {'edited':>7s} {'background':>11s} {'whole':>7s} {'seconds':>8s}")
    rows = []

    def row(name: str, draw) -> None:
        start = time.perf_counter()
        pictures = draw()
        seconds = time.perf_counter() - start
        figures = score(bench, judge, pictures)
        rows.append(pictures)
        print(
            f"{name:48s} {figures['edited']:7.2f} {figures['background']:11.2f} {figures['whole']:7.2f} {seconds:8.1f}",
            flush=True,
        )

    row("source, left unchanged", lambda: bench.reconstructed_source)
    row("ground truth", lambda: bench.reconstructed_truth)
    row("plain DDIM reconstruction", bench.reconstruct)
    for cfg in options.cfg:
        row(f"word swap, cfg {cfg:g}", lambda: bench.redraw(bench.word_swap(), cfg, 0.0))
        for strength, blend in product(options.strength, options.blend):
            row(
                f"direction, cfg {cfg:g}, guidance {strength:g}, blend {blend:g}",
                lambda: bench.redraw(bench.moved(), cfg, strength, blend, preset=options.preset),
            )
    OUTPUT.mkdir(exist_ok=True)
    sheet = OUTPUT / f"bench_{options.edit}.png"
    columns = torch.cat([torch.cat(list(pictures[:10]), dim=1) for pictures in [bench.scenes.sources, *rows]])
    Image.fromarray((columns.clamp(0, 1) * 255).round().byte().numpy()).save(sheet)
    print(f"wrote {sheet.relative_to(OUTPUT.parent)}: sources, then the rows above")


if __name__ == "__main__":
    sys.exit(main())
