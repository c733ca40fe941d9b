"""Trains a student on pairs: by steps or by the clock, checkpointed, resumed to the same step.

Runs in one process, or in several that torchrun has started (they average their gradients).
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..editing.inputs import interruptible, look
from .adversary import BEGINS, Adversary
from .checkpoints import read_checkpoint, write_checkpoint
from .losses import Features, LossWeights, feature_loss, pixel_loss, pixel_weights, slope_loss
from .optimizer import make_optimizers
from .pairs import Pairs
from .processes import average_gradients, place, share

LOOKED_AT = 64  # held-out pairs that are measured while it trains
TOGETHER = 2**18  # pixels of held-out pictures that are measured at once


class TrainingError(ValueError):
    """Training that cannot go on, in the user's words."""


@dataclass(frozen=True)
class Settings:
    """How to train. The length is `steps`, or `minutes` where that is not None: then the learning rate follows the clock.

    `average`: of the weights' running mean, which is what is kept. `half`: mixed precision, fp16 on a GPU and bf16 on a CPU.
    `crop`: side in pixels of the squares that are trained on, 0 for whole pictures. `sharpness`: of the adversary's gradient
    beside the other losses', 0 for none. `batch` is that of all processes together. `mirror`: half of the pairs are mirrored,
    which is right where the edit of a mirrored picture is the edit mirrored.
    """

    steps: int = 4000
    minutes: float | None = None
    batch: int = 16
    learning_rate: float = 2e-3
    warmup: int = 50
    average: float = 0.999
    half: bool = False
    crop: int = 0
    seed: int = 0
    sharpness: float = 0.0
    mirror: bool = True
    weights: LossWeights = field(default_factory=LossWeights)
    save_seconds: float = 30.0


@dataclass(frozen=True)
class Report:
    """How far it is: `progress` in 0..1, `loss` a running mean, `rate` steps per second."""

    step: int
    progress: float
    seconds: float
    loss: float
    rate: float


class Training:
    """One run. `features`: maps of pictures [B, 3, H, W] in 0..1 that the feature error is taken of, or None.

    `pairs` may lie on another device than the student. `checkpoint`: file to resume from if it is there, and to save to.
    """

    def __init__(
        self,
        student: nn.Module,
        pairs: Pairs,
        settings: Settings,
        features: Features | None = None,
        checkpoint: Path | None = None,
    ):
        self.student, self.settings, self.features, self.checkpoint = student.train(), settings, features, checkpoint
        self.pairs, self.held_out = pairs.split()
        whole = int(pairs.areas.min()) == 255
        self.weights = settings.weights.for_whole_pictures() if whole else settings.weights
        self.average = copy.deepcopy(student).eval().requires_grad_(False)
        self.optimizers = make_optimizers(student, settings.learning_rate)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.device = next(student.parameters()).device
        self.adversary: Adversary | None = None
        if settings.sharpness:
            self.adversary = Adversary(settings.sharpness, settings.learning_rate, settings.seed, self.device)
            _look_at_each_layer(self.adversary.discriminator)
        for network in (self.student, self.average):
            _look_at_each_layer(network)
        self.step, self.seconds, self.loss = 0, 0.0, 0.0
        self.losses: list[float] = []
        self._last: Tensor | None = None
        self._half = torch.bfloat16 if self.device.type == "cpu" else torch.float16
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=settings.half and self._half == torch.float16)
        if checkpoint is not None and checkpoint.is_file():
            read_checkpoint(checkpoint, self)

    def networks(self) -> dict[str, nn.Module]:
        """All that a checkpoint holds, by name."""
        found = {"student": self.student, "average": self.average}
        return found if self.adversary is None else found | {"discriminator": self.adversary.discriminator}

    def all_optimizers(self) -> list[torch.optim.Optimizer]:
        """The student's, then the discriminator's."""
        return self.optimizers if self.adversary is None else [*self.optimizers, self.adversary.optimizer]

    @property
    def progress(self) -> float:
        """In 0..1, by the clock or by steps."""
        if self.settings.minutes is not None:
            return min(1.0, self.seconds / max(1e-9, 60 * self.settings.minutes))
        return min(1.0, self.step / self.settings.steps)

    def run(self, on_step: Callable[[Report], None] | None = None) -> nn.Module:
        """Train to the end and return the averaged student. `on_step` may raise to stop: nothing is lost then.

        Raises TrainingError: the loss is NaN or infinite.
        """
        first, begin, before, saved = self.step, time.monotonic(), self.seconds, time.monotonic()
        try:
            while self.progress < 1:
                self._one_step()
                now = time.monotonic()
                self.seconds = before + now - begin
                if self.checkpoint is not None and now - saved > self.settings.save_seconds:
                    self.save()
                    saved = time.monotonic()
                if on_step is not None:
                    rate = (self.step - first) / max(1e-9, now - begin)
                    on_step(Report(self.step, self.progress, self.seconds, self.loss, rate))
        finally:
            if self.checkpoint is not None:
                self.save()
        return self.average

    def save(self) -> None:
        """Write the checkpoint, unless the last step has gone wrong. Of several processes the first does it."""
        if place()[0]:
            return
        if self._last is None or self._last.isfinite():
            write_checkpoint(self.checkpoint, self)

    def _one_step(self) -> None:
        drawn = self.generator.get_state()
        try:
            whole, loss, opposed = self._backward()
        except BaseException:  # cancelled within the step: a resumed run makes it whole
            self.generator.set_state(drawn)
            raise
        self._descend()
        if opposed:
            self.adversary.descend(self._rate())
        self._follow()
        self._last = whole.detach()
        self.step += 1
        if self.step % 10 == 1:  # reading it waits for the device
            self._note(loss.item())

    def _backward(self) -> tuple[Tensor, Tensor, bool]:
        """The gradients of one step: (the whole loss, the loss without the adversary's part, whether it takes part)."""
        source, target, area = self._draw()
        counted = pixel_weights(source, target, area, self.weights)
        with torch.autocast(self.device.type, self._half) if self.settings.half else contextlib.nullcontext():
            output = self.student(source)
        output = output.float()
        loss = pixel_loss(output, target, counted)
        if self.weights.slopes:
            loss = loss + self.weights.slopes * slope_loss(output, target, counted)
        if self.features is not None and self.weights.features:
            loss = loss + self.weights.features * feature_loss(self.features, output, target)
        opposed = self.adversary is not None and self.progress >= BEGINS
        whole = loss + self.adversary.toward_teacher(source, output, target, loss) if opposed else loss
        self.student.zero_grad(set_to_none=True)
        self._scaler.scale(whole).backward()
        average_gradients(self.student)
        if opposed:
            self.adversary.compare(source, output, target)
        return whole, loss, opposed

    def _descend(self) -> None:
        """One step of the student's optimizers."""
        for optimizer in self.optimizers:
            self._scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self._rate()
            self._scaler.step(optimizer)
        self._scaler.update()

    def _draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """This process's part of a batch, each pair cut and flipped or not. Convolutions are faster on channels that lie
        together."""
        batch = self.settings.batch
        chosen = torch.randint(len(self.pairs), (batch,), generator=self.generator)
        flipped = share(torch.rand(batch, generator=self.generator) < 0.5) & self.settings.mirror
        height, width = self.pairs.sources.shape[-2:]
        size = [min(self.settings.crop or side, side) for side in (height, width)]
        corners = [
            share(torch.randint(side - kept + 1, (batch,), generator=self.generator)).tolist() if kept < side else None
            for side, kept in zip((height, width), size)
        ]
        data = _cut(self.pairs.take(share(chosen)), corners, size)
        flipped = flipped.to(self.device).view(-1, 1, 1, 1)
        source, target, area = (torch.where(flipped, one.flip(-1), one) for one in (x.to(self.device) for x in data))
        return source.contiguous(memory_format=torch.channels_last), target, area

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.settings.warmup)
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress)))

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.settings.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.student.parameters()), 1 - decay)

    def _note(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {self.step}: the loss is {loss}. Lower the learning rate; what was saved before is kept."
            )
        decay = min(0.95, len(self.losses) / (10 + len(self.losses)))
        self.loss = decay * self.loss + (1 - decay) * loss
        self.losses.append(loss)

    def held_out_error(self) -> float:
        """The averaged student's mean error inside the edited areas of some held-out pairs, 0..255."""
        sums = self._held_out_sums(LOOKED_AT)
        return 255 * float(sums[:, 0].sum() / sums[:, 1].sum().clamp_min(1e-6))

    def held_out_errors(self) -> list[float]:
        """The same for each held-out pair alone."""
        sums = self._held_out_sums(len(self.held_out))
        return (255 * sums[:, 0] / sums[:, 1].clamp_min(1e-6)).tolist()

    @torch.no_grad()
    def _held_out_sums(self, most: int) -> Tensor:
        """Of each held-out pair the sums of error inside the edited area, and of that area: [N, 2]."""
        count, found = min(len(self.held_out), most), []
        together = max(1, TOGETHER // self.held_out.sources[0, 0].numel())
        for first in interruptible(range(0, count, together)):
            data = self.held_out.take(list(range(first, min(first + together, count))))
            source, target, where = (part.to(self.device) for part in data)
            difference = (self.average(source).clamp(0, 1) - target).abs().mean(1, keepdim=True)
            found.append(torch.stack([(difference * where).sum((1, 2, 3)), where.sum((1, 2, 3))], 1).cpu())
        return torch.cat(found)


def _look_at_each_layer(network: nn.Module) -> None:
    """Let a step be cancelled at each layer of `network`, forward and backward."""

    def forward(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        look()
        if output.requires_grad:
            output.register_hook(lambda _: look())

    for layer in network.modules():
        if not any(layer.children()):
            layer.register_forward_hook(forward)


def _cut(data: tuple[Tensor, ...], corners: list[list[int] | None], size: list[int]) -> tuple[Tensor, ...]:
    """A rectangle of `size` of each picture of each [B, C, H, W]. `corners`: first rows and first columns, None where whole."""
    if corners == [None, None]:
        return data
    tops, lefts = (given or [0] * len(data[0]) for given in corners)
    places = [(slice(top, top + size[0]), slice(left, left + size[1])) for top, left in zip(tops, lefts)]
    return tuple(torch.stack([picture[:, y, x] for picture, (y, x) in zip(one, places)]) for one in data)
