"""Pairs for the demo's students: training scenes, edited by the pack's own nodes."""

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...benchmarks.quality_parts.scenes import EDITS, QualityEdit
from ...distillation.pairs import PairFolder
from ...nodes.sockets import with_defaults
from ..scene import sample_scene
from ..scene_renders import render

log = logging.getLogger("pix2pix_zero.distilled")


DRAWN_BY = (
    "Caption",
    "EditDirection",
    "Inversion",
    "ApplyDirection",
    "KSampler",
)  # nodes, whose defaults make the edit


class Teacher:
    """The edit with the nodes' defaults and the edit's own knobs, on the demo model. `steps`: of the inversion."""

    def __init__(self, edit: QualityEdit, steps: int):
        import nodes as host_nodes

        self.edit, self.steps = edit, steps
        self._nodes = _nodes()
        self._encode_text = host_nodes.CLIPTextEncode().encode
        self.model, self.clip, self.vae = self._run("DemoModel")
        (self.captioner,) = self._run("LoadCaptioner", model_name="demo", allow_download=False)
        concept = edit.concept
        (self.direction,) = self._run("EditDirection", clip=self.clip, source=concept.source, target=concept.target)

    def _run(self, name: str, **inputs: object) -> tuple:
        """The outputs of a node, its other inputs left at their defaults."""
        node = self._nodes[name]
        inputs = with_defaults(node, inputs)
        if node.GET_SCHEMA().is_input_list:
            inputs = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
        return node.execute(**inputs).result

    @torch.inference_mode()
    def draw(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(edited pictures [B, H, W, 3], edited areas [B, H, W]) of pictures [B, H, W, 3], all in 0..1."""
        concept = self.edit.concept
        (captions,) = self._run("Caption", captioner=self.captioner, image=pictures)
        texts = [self._encode_text(self.clip, caption)[0] for caption in captions]
        (inversion, *_) = self._run(
            "Inversion",
            model=self.model,
            positive=_Listed(texts),
            latent_image={"samples": self.vae.encode(pictures)},
            steps=self.steps,
        )
        moved = [
            self._run("ApplyDirection", conditioning=text, direction=self.direction, strength=concept.strength)[0]
            for text in texts
        ]
        whole = {"local_blend": 0.0} if self.edit.whole_picture else {}
        latents, areas = self._run(
            "KSampler",
            model=self.model,
            inversion=inversion,
            positive=_Listed(moved),
            negative=_Listed(texts),
            cfg=concept.cfg,
            **whole,
        )
        return self.vae.decode(latents[0]["samples"]).clamp(0, 1), areas[0]


class _Listed(list):
    """A list of conditionings, which are lists themselves."""


def _nodes() -> dict[str, type]:
    from ...nodes import NODES

    return {node.__name__.removeprefix("Pix2PixZero"): node for node in NODES}


def render_sources(edit: QualityEdit, seeds: Sequence[int]) -> Tensor:
    """The unedited scenes [B, H, W, 3] in 0..1."""
    pictures = [render(sample_scene(seed, **edit.before)) for seed in seeds]
    return torch.from_numpy(np.stack(pictures)).float() / 255


def keep_outside(source: Tensor, edited: Tensor, area: Tensor) -> Tensor:
    """`edited` where it was edited, the source's own pixels elsewhere. Pictures [B, H, W, 3], area [B, H, W]."""
    return torch.lerp(source, edited, area[..., None].clamp(0, 1))


def what_is_shared(name: str, steps: int) -> dict[str, object]:
    """What the manifest of a pair folder holds: pairs of another teacher do not get into it."""
    from ..loader import WEIGHTS

    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    concept = asdict(EDITS[name].concept)
    nodes = _nodes()
    defaults = {node: with_defaults(nodes[node], {}) for node in DRAWN_BY}
    return {"edit": name, "steps": steps, "teacher": digest, "knobs": concept, "defaults": defaults}


@dataclass(frozen=True)
class Job:
    """Pairs to draw: those of `seeds` that are not in `folder` yet, until `deadline` on the wall's clock."""

    folder: str
    seeds: Sequence[int]
    deadline: float = float("inf")


def draw_pairs(name: str, jobs: Sequence[Job], steps: int, batch: int) -> None:
    """Do the jobs for an edit of `bench quality`, one after the other."""
    teacher = None
    for job in jobs:
        pairs = PairFolder(job.folder, what_is_shared(name, steps))
        pairs.begin()
        there = set(pairs.keys())
        missing = [seed for seed in job.seeds if str(seed) not in there]
        if not missing or time.time() > job.deadline:
            continue
        teacher = teacher or Teacher(EDITS[name], steps)
        begin, done = time.monotonic(), 0
        while done < len(missing) and (not done or time.time() < job.deadline):
            chosen = missing[done : done + batch]
            _draw_batch(teacher, pairs, chosen)
            done += len(chosen)
            seconds = (time.monotonic() - begin) / done
            log.info("%s: %d of %d, %.2f s each", pairs.folder.name, done, len(missing), seconds)


def _draw_batch(teacher: Teacher, pairs: PairFolder, seeds: Sequence[int]) -> None:
    edit = teacher.edit
    sources = render_sources(edit, seeds)
    edited, areas = (result.to(sources) for result in teacher.draw(sources))
    if not edit.whole_picture:
        edited = keep_outside(sources, edited, areas)
    caption = f"{edit.concept.source} to {edit.concept.target}"
    for index, seed in enumerate(seeds):
        area = None if edit.whole_picture else areas[index]
        pairs.write(str(seed), sources[index], edited[index], area, caption)


def draw_share(share: slice, device: str, name: str, jobs: Sequence[Job], steps: int, batch: int) -> None:
    """`draw_pairs` of some of each job's seeds, in a process of its own."""
    from ..distill_students import quiet_host

    quiet_host(device)
    draw_pairs(name, [replace(job, seeds=job.seeds[share]) for job in jobs], steps, batch)
