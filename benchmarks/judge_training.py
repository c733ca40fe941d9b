"""Train the judge on renders: `python -m pix2pix_zero.benchmarks.judge_training` (one core, a few minutes).

Besides clean renders it sees what a latent model makes of them (decoded by the demo's autoencoder, blurred, noisy,
off-colour, shifted), and pictures where the animal is half of one kind and half of another or smeared away. Those carry
soft labels, so that the judge is unsure where a person would be unsure instead of naming the nearest animal with
confidence.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..demo_model.autoencoder import LightAutoencoder
from ..demo_model.captioner_training import augment, gaussian_blur, render_scenes
from ..demo_model.eight_bits import unpacked
from ..demo_model.scene import SUBJECTS, Scene, sample_scene
from ..demo_model.scene_renders import render, subject_mask
from .judge import QUESTIONS, WEIGHTS, Judge, JudgeNetwork

logger = logging.getLogger(__name__)

TRAINING_SEED = 1_000_000
HELD_OUT_SEED = 700_000
DEMO_WEIGHTS = Path(__file__).parent.parent / "demo_model" / "weights.safetensors"
AUTOENCODER_PREFIX = "first_stage_model."


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """One-hot answers [B, n] for every question; all zero where a question has no answer, so that it counts nothing."""
    result = {}
    for question, answers in QUESTIONS.items():
        index = torch.tensor([answers.index(getattr(scene, question)) for scene in scenes])
        result[question] = nn.functional.one_hot(index, len(answers)).float()
    colourless = torch.tensor([scene.subject == "zebra" or scene.style == "pencil sketch" for scene in scenes])
    result["fur"][colourless] = 0
    return result


def half_formed(scenes: list[Scene], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures of animals between two kinds, and of animals smeared away: uint8 [B, H, W, 3] with soft labels."""
    generator = torch.Generator().manual_seed(seed)
    soft = labels(scenes)
    pictures = []
    for index, scene in enumerate(scenes):
        picture = torch.from_numpy(render(scene)).float()
        if index % 3:
            step = int(torch.randint(1, len(SUBJECTS), (1,), generator=generator))
            other = SUBJECTS[(SUBJECTS.index(scene.subject) + step) % len(SUBJECTS)]
            share = 0.25 + 0.5 * float(torch.rand(1, generator=generator))
            picture = picture.lerp(torch.from_numpy(render(replace(scene, subject=other))).float(), share)
            soft["subject"][index] *= 1 - share
            soft["subject"][index, SUBJECTS.index(other)] = share
            soft["fur"][index] = 0
        else:
            mask = torch.from_numpy(subject_mask(scene)).float()[None, None]
            mask = (gaussian_blur(mask, 4.0) * 2).clamp(0, 1)[0, 0, ..., None]
            smear = gaussian_blur(picture.movedim(-1, 0)[None], 14.0)[0].movedim(0, -1)
            picture = picture.lerp(smear, mask)
            soft["subject"][index] = 1 / len(SUBJECTS)
            soft["fur"][index] = 0
            soft["glasses"][index] = torch.tensor([1.0, 0.0])
        pictures.append(picture.round().to(torch.uint8))
    return torch.stack(pictures), soft


@torch.no_grad()
def autoencoded(pictures: Tensor, weights: dict[str, Tensor], noise: float, seed: int) -> Tensor:
    """uint8 [B, H, W, 3] after a round trip through the autoencoder, with up to `noise` added to each latent."""
    generator = torch.Generator().manual_seed(seed)
    autoencoder = LightAutoencoder().eval()
    autoencoder.load_state_dict({key: value.float() for key, value in weights.items()})
    decoded = []
    for chunk in pictures.split(50):
        latent = autoencoder.encode(chunk.movedim(-1, 1).float() / 127.5 - 1)
        share = noise * torch.rand(len(chunk), 1, 1, 1, generator=generator)
        latent = latent + share * torch.randn(latent.shape, generator=generator)
        decoded.append(((autoencoder.decode(latent).movedim(1, -1) + 1) * 127.5).clamp(0, 255).round().to(torch.uint8))
    return torch.cat(decoded)


def training_set(
    scenes: list[Scene], autoencoder: dict[str, Tensor], seed: int, renders: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures and answers: half of the scenes as rendered, half autoencoded, and an eighth more half-formed.

    `renders`: those of `scenes`, if they are there already.
    """
    pictures = (render_scenes(scenes) if renders is None else renders).clone()
    half = len(scenes) // 2
    pictures[half:] = autoencoded(pictures[half:], autoencoder, 0.2, seed)
    answers = labels(scenes)
    blends, soft = half_formed(scenes[: len(scenes) // 8], seed)
    return torch.cat([pictures, blends]), {key: torch.cat([answers[key], soft[key]]) for key in QUESTIONS}


def train_judge(
    pictures: Tensor,
    answers: dict[str, Tensor],
    steps: int = 700,
    batch: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> tuple[JudgeNetwork, list[float]]:
    """Train on `pictures` (uint8 [N, 128, 128, 3]) and soft `answers`; returns the network and every step's loss."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = JudgeNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(pictures), (batch,), generator=generator)
        logits = network(augment(pictures[rows].float().movedim(-1, 1) / 255, generator))
        loss = sum(-(answers[q][rows] * logits[q].log_softmax(dim=1)).sum(dim=1).mean() for q in QUESTIONS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            logger.info("judge step %d of %d: loss %.3f", step, steps, losses[-1])
    return network.eval(), losses


def accuracy(judge: Judge, pictures: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """The share of right answers per question on pictures [B, H, W, 3] in 0..1, `fur` only where there is one."""
    truth = labels(scenes)
    result = {}
    for question, probabilities in judge(pictures).items():
        counts = truth[question].sum(dim=1) > 0
        right = probabilities.argmax(dim=1) == truth[question].argmax(dim=1)
        result[question] = right[counts].float().mean().item()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--renders", type=int, default=16000)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder", type=Path, default=DEMO_WEIGHTS, help="the demo model's weights")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)

    weights = unpacked(load_file(options.autoencoder))
    weights = {k.removeprefix(AUTOENCODER_PREFIX): v for k, v in weights.items() if k.startswith(AUTOENCODER_PREFIX)}

    scenes = [sample_scene(TRAINING_SEED + index) for index in range(options.renders)]
    pictures, answers = training_set(scenes, weights, options.seed)
    network, _ = train_judge(pictures, answers, options.steps, seed=options.seed)
    save_file({key: value.half() for key, value in network.state_dict().items()}, options.output)

    scenes = [sample_scene(HELD_OUT_SEED + index) for index in range(500)]
    renders = render_scenes(scenes)
    blurred = gaussian_blur(renders.float().movedim(-1, 1), 1.2).movedim(1, -1)
    for name, images in (
        ("renders", renders),
        ("blurred", blurred),
        ("autoencoded", autoencoded(renders, weights, 0.0, 0)),
        ("autoencoded with noise", autoencoded(renders, weights, 0.3, 0)),
    ):
        figures = accuracy(Judge(network), images.float() / 255, scenes)
        logger.info("held-out, %s: %s", name, ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
