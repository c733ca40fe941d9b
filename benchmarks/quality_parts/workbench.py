"""The demo model, and what the methods share of one set of scenes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import nodes as host_nodes

from ...demo_model.loader import WEIGHTS
from ...editing.directions import EditDirection
from ...editing.regularization import NoiseRegularization
from ...editing.trajectory import Inversion
from ...host.networks.captioner import load_demo_captioner
from ...host.sampling.checks import AUTO
from ...host.sampling.invert import InversionSettings, invert_latent
from ...host.text.conditionings import stack_conditionings
from ...nodes.demo import DIFFUSION, Pix2PixZeroDemoModel
from ...nodes.directions import Pix2PixZeroApplyDirection, Pix2PixZeroEditDirection
from ...nodes.inversion import Pix2PixZeroInversion
from .scenes import QualityEdit, Scenes


def node_default(node_class: type, socket: str):
    """The default value that a node shows for one of its inputs."""
    return next(item.default for item in node_class.define_schema().inputs if item.id == socket)


@dataclass(frozen=True)
class DemoModels:
    """Everything that is loaded once. `scheduler`: whose noise levels all methods go by."""

    model: object
    clip: object
    vae: object
    captioner: object
    scheduler: str = AUTO
    _directions: dict[tuple[str, str], EditDirection] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def load(cls, objective: str = DIFFUSION, scheduler: str = AUTO) -> "DemoModels":
        """`objective`: of *Load Demo Model*."""
        model, clip, vae = Pix2PixZeroDemoModel.execute(objective).result
        return cls(model, clip, vae, load_demo_captioner(WEIGHTS), scheduler)

    def direction(self, source: str, target: str) -> EditDirection:
        """From one word to the other, found once."""
        if (source, target) not in self._directions:
            (self._directions[source, target],) = Pix2PixZeroEditDirection.execute(self.clip, source, target).result
        return self._directions[source, target]


class Workbench:
    """One edit of some scenes. Methods read from it and return LATENT samples; `timed` tells what that took.

    `settings`: inputs of this pack's sampler to try in place of their defaults.
    """

    def __init__(
        self,
        models: DemoModels,
        edit: QualityEdit,
        scenes: Scenes,
        steps: int,
        settings: dict[str, float] | None = None,
    ):
        self.model, self.clip, self.vae, self.scheduler = models.model, models.clip, models.vae, models.scheduler
        self.edit, self.scenes, self.steps, self.settings = edit, scenes, steps, settings or {}
        self.captions = models.captioner.caption(scenes.sources)
        self.wanted_captions = [text.replace(*edit.swap) for text in self.captions]
        self.described, self.wanted = self.encode(self.captions), self.encode(self.wanted_captions)
        concept = edit.concept
        self.direction = models.direction(concept.source, concept.target)
        (self.moved,) = Pix2PixZeroApplyDirection.execute(self.described, self.direction, concept.strength).result
        self.latent = self.vae.encode(scenes.sources)
        self.source = self.vae.decode(self.latent)
        self.truth = self.vae.decode(self.vae.encode(scenes.truths))
        self._kept: dict[object, tuple[object, float]] = {}
        self._saved = 0.0
        self.area: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def encode(self, texts: list[str]) -> list:
        """CONDITIONING with a row for each text, encoded by the host's own node."""
        encoded = [host_nodes.CLIPTextEncode().encode(self.clip, text)[0] for text in texts]
        return stack_conditionings(encoded, "captions")

    def inversion(self, steps: int | None = None, method: str | None = None) -> Inversion:
        """The scenes, inverted as the node does when nothing on it is changed but the steps and the method."""
        steps = steps or self.steps
        method = method or node_default(Pix2PixZeroInversion, "method")
        return self.once((steps, method), lambda: self._invert(steps, method))

    def _invert(self, steps: int, method: str) -> Inversion:
        names = ("autocorrelation_weight", "kl_weight", "regularization_steps", "autocorrelation_rolls")
        regularization = NoiseRegularization(*(node_default(Pix2PixZeroInversion, name) for name in names))
        latent = {"samples": self.latent}
        settings = InversionSettings(steps, 0, regularization, method, scheduler=self.scheduler)
        return invert_latent(self.model, self.described, latent, settings)

    def keep_area(self, edited: tuple[Tensor, Tensor]) -> Tensor:
        """The samples of an edit; the area that it tells is kept in `area` until the next is timed."""
        samples, self.area = edited
        return samples

    def once(self, key: object, make: Callable[[], object]):
        """What `make` returns, kept for every knob and method that asks for the same; its seconds count each time."""
        if key in self._kept:
            self._saved += self._kept[key][1]
        else:
            start = time.perf_counter()
            self._kept[key] = make(), time.perf_counter() - start
        return self._kept[key][0]

    def timed(self, draw: Callable[["Workbench", float], Tensor], knob: float) -> tuple[Tensor, float]:
        """(pictures [B, H, W, 3], seconds per picture with encoding left out and the inversion counted in)."""
        self._saved, self.area = 0.0, None
        start = time.perf_counter()
        pictures = self.vae.decode(draw(self, knob))
        return pictures, (time.perf_counter() - start + self._saved) / len(self)


def one_of(inversion: Inversion, index: int) -> Inversion:
    """The inversion of a single picture of a batch."""
    row = slice(index, index + 1)
    return replace(
        inversion,
        trajectory=inversion.trajectory[:, row],
        residuals=None if inversion.residuals is None else inversion.residuals[:, row],
        source=row_of(inversion.source, index),
        maps=None,
    )


def row_of(conditioning: list, index: int) -> list:
    """The CONDITIONING of a single picture of a batch."""
    row = slice(index, index + 1)
    return [
        [text[row], {name: value[row] if torch.is_tensor(value) else value for name, value in extras.items()}]
        for text, extras in conditioning
    ]
