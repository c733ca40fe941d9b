"""Tells what is in a picture of the demo's world, so that edits and samples can be scored without a human.

A small convolutional network trained on renders by `judge_training.py`. It is a measuring tool and no part of the
pack's model: nothing in `nodes/` uses it.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..demo_model.scene import ATTRIBUTES, SIZE

WEIGHTS = Path(__file__).with_name("judge.safetensors")

# Every question with its possible answers, in the order of the network's outputs.
QUESTIONS = ATTRIBUTES


class JudgeNetwork(nn.Module):
    """Pictures [B, 3, 128, 128] in 0..1 to one row of logits per question."""

    def __init__(self, channels: tuple[int, ...] = (24, 48, 64, 96)):
        super().__init__()
        layers, before = [], 3
        for index, after in enumerate(channels):
            size, stride = (5, 4) if index == 0 else (3, 2)
            layers += [nn.Conv2d(before, after, size, stride, size // 2), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.features = nn.Sequential(*layers, nn.Flatten())
        cells = SIZE // (2 ** (len(channels) + 1))
        self.answers = nn.Linear(before * cells**2, sum(map(len, QUESTIONS.values())))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        logits = self.answers(self.features(pictures - 0.5))
        return dict(zip(QUESTIONS, logits.split([len(answers) for answers in QUESTIONS.values()], dim=1)))


class Judge:
    """Call with pictures to get probabilities; `answers` gives the likeliest answers."""

    def __init__(self, network: JudgeNetwork):
        self.network = network.eval()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Probabilities for every question about `images` [B, H, W, 3] in 0..1, of any size.

        For every key of QUESTIONS a tensor [B, number of answers] whose rows sum to 1. `fur` means nothing for zebras and
        pencil sketches, which have no fur colour.
        """
        pictures = images.detach().float().cpu().clamp(0, 1).movedim(-1, 1)
        if pictures.shape[-2:] != (SIZE, SIZE):
            pictures = nn.functional.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
        rows = [self.network(chunk) for chunk in pictures.split(64)]
        return {question: torch.cat([row[question] for row in rows]).softmax(dim=1) for question in QUESTIONS}

    def answers(self, images: Tensor) -> dict[str, list]:
        """The likeliest answer to every question for every picture: names for words, bools for yes and no."""
        return {
            question: [QUESTIONS[question][index] for index in probabilities.argmax(dim=1).tolist()]
            for question, probabilities in self(images).items()
        }


def load_judge(weights: Path = WEIGHTS) -> Judge:
    """The trained judge. Raises RuntimeError if a weight is missing or left over."""
    network = JudgeNetwork()
    network.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    return Judge(network)
