"""A student trained inside ComfyUI: on its device, with progress and preview, to be cancelled and resumed."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from safetensors import SafetensorError
from torch import nn

from ...distillation.checkpoints import FIXED, checkpoint_settings, feature_name
from ...distillation.learning import Report, Settings, Training
from ...distillation.pairs import Pairs
from ...editing.writing import write_numbered
from ..messages import FEW_PAIRS, TRAINING
from ..networks.students import make_student, student_bytes, upscale_model
from ..networks.teacher_features import EncoderFeatures, TeacherFeatures
from ..running import show, tell
from .names import plain_name
from .pair_sets import FEW, load_pairs
from .views import held_out_strip, preview, write_report

FOLDER = "pix2pix_zero"  # in models/upscale_models
SHOW_SECONDS = 2.0
PART_OF_MEMORY = 0.25  # of what is free, that pairs may take on the device

Result = TypeVar("Result")


@dataclass(frozen=True)
class Wish:
    """What the user asks for. `crop`: side of the squares that are trained on, in pixels."""

    dataset: str
    name: str
    size: str = "small"
    settings: Settings = Settings()
    resume: bool = True
    description: str = ""


@dataclass(frozen=True)
class Distilled:
    """`model`: an UPSCALE_MODEL. `strip`: IMAGE [1, H, W, 3]. `losses`: every tenth step's."""

    model: object
    strip: torch.Tensor
    report: str
    losses: list[float]


def distill(wish: Wish, vae: VAE | None = None, model: ModelPatcher | None = None) -> Distilled:
    """Train a student on a data set, write it to models/upscale_models/pix2pix_zero, and measure it on held-out pairs.

    `vae`: whose encoder's features count too; `model`: whose UNet's features of the VAE's latents count as well. A cancelled
    training keeps its state and is gone on with by `wish.resume`.
    Raises ValueError, naming the socket, if the data set, a name, the VAE or the model does not do, or files cannot be written.
    """
    if model is not None and vae is None:
        raise ValueError("vae: the model needs it, as it sees latents. Connect the VAE of its checkpoint.")
    name = plain_name(wish.name, "name")
    pairs = load_pairs(wish.dataset)
    checkpoint = _checkpoint(name, wish, _features_wanted(vae, model))
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    device = comfy.model_management.get_torch_device()
    # The executor's inference mode would make weights that have no derivative.
    with torch.inference_mode(False), torch.enable_grad():
        features = None if vae is None else _features(vae, model, device)
        student = make_student(wish.size, wish.settings.seed).to(device, memory_format=torch.channels_last)
        if _fits(pairs, device):
            pairs = pairs.to(device)
        settings = replace(wish.settings, half=device.type == "cuda")
        run = _readable(Training, student, pairs, settings, features, checkpoint)
        _train(run, wish.settings.steps)
        errors = run.held_out_errors()
        report = write_report(wish, run, errors)
        path = _write(run.average, name, _facts(wish, run, errors))
        strip = held_out_strip(run, errors)
    checkpoint.unlink(missing_ok=True)
    report = f"{report}\nWritten: {path.parent.name}/{path.name} in {path.parent.parent}"
    tell(report.splitlines()[0])
    return Distilled(upscale_model(path), strip, report, run.losses)


def _features_wanted(vae: VAE | None, model: ModelPatcher | None) -> str:
    if vae is None:
        return ""
    return (EncoderFeatures if model is None else TeacherFeatures).name


def _checkpoint(name: str, wish: Wish, features: str) -> Path:
    """Where the state of this training is kept. Raises ValueError if what is there was made with other settings."""
    file = f"{name}_{plain_name(wish.dataset, 'dataset')}_{wish.size}.safetensors"
    path = Path(folder_paths.get_output_directory()) / "pix2pix_zero" / "training" / file
    if not wish.resume:
        path.unlink(missing_ok=True)
    if path.is_file():
        found = _readable(checkpoint_settings, path)
        was = [f"{key} {found.get(key)}" for key in FIXED if found.get(key) != getattr(wish.settings, key)]
        if found.get("features") != features:
            was.append(found.get("features") or "no vae")
        if was:
            raise ValueError(
                f"resume: the training that was cancelled had {', '.join(was)}. Set that back to go on with it, or "
                "switch resume off to begin anew."
            )
    return path


def _readable(read: Callable[..., Result], *arguments: object) -> Result:
    try:
        return read(*arguments)
    except (SafetensorError, KeyError, TypeError, OSError) as failure:
        raise ValueError(
            f"resume: the state of the cancelled training is damaged ({failure}). Switch resume off to begin anew."
        ) from failure


def _features(vae: VAE, model: ModelPatcher | None, device: torch.device) -> EncoderFeatures | TeacherFeatures:
    try:
        features = EncoderFeatures(vae, device)
        with torch.no_grad():
            features(torch.zeros(1, 3, 64, 64, device=device))
    except (AttributeError, RuntimeError, TypeError, ValueError) as failure:
        raise ValueError(
            "vae: its encoder cannot be looked into. Connect the VAE of a Stable Diffusion or Flux checkpoint, or none."
        ) from failure
    return features if model is None else TeacherFeatures(model, features)


def _fits(pairs: Pairs, device: torch.device) -> bool:
    needed = sum(data.nbytes for data in (pairs.sources, pairs.edited, pairs.areas))
    return needed < PART_OF_MEMORY * comfy.model_management.get_free_memory(device)


def _train(run: Training, steps: int) -> None:
    bar = comfy.utils.ProgressBar(steps)
    pairs = len(run.pairs) + len(run.held_out)
    if pairs < FEW:
        tell(FEW_PAIRS.format(pairs=pairs, enough=FEW))
    shown = 0.0

    def on_step(report: Report) -> None:
        nonlocal shown
        comfy.model_management.throw_exception_if_processing_interrupted()
        if time.monotonic() - shown < SHOW_SECONDS and report.step < steps:
            return
        shown = time.monotonic()
        left = _duration((steps - report.step) / max(1e-9, report.rate))
        show(TRAINING.format(step=report.step, steps=steps, loss=f"{report.loss:.4f}", left=left))
        bar.update_absolute(report.step, steps, preview(run))

    run.run(on_step)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _facts(wish: Wish, run: Training, errors: list[float]) -> dict[str, object]:
    """The metadata of the file."""
    height, width = run.pairs.sources.shape[-2:]
    return {
        "description": wish.description.strip() or "an edit of " + wish.dataset.strip(),
        "dataset": wish.dataset.strip(),
        "pairs": len(run.pairs) + len(run.held_out),
        "pictures": f"{width}x{height}",
        "size": wish.size,
        "steps": run.step,
        "batch": wish.settings.batch,
        "crop": wish.settings.crop,
        "learning_rate": wish.settings.learning_rate,
        "seed": wish.settings.seed,
        "sharpness": wish.settings.sharpness,
        "features": feature_name(run.features),
        "agreement": {"inside": round(sum(errors) / len(errors), 3), "worst": round(max(errors), 3)},
    }


def _write(student: nn.Module, name: str, facts: dict[str, object]) -> Path:
    """Write the student beside the earlier ones of its name, numbered."""
    content = student_bytes(student, facts)
    folder = Path(folder_paths.get_folder_paths("upscale_models")[0]) / FOLDER
    numbered = re.compile(re.escape(name) + r"_(\d{5,})\.safetensors", re.ASCII)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(found[1]) for item in folder.iterdir() if (found := numbered.fullmatch(item.name))]
        next_one = max(taken, default=0) + 1
        path = write_numbered(folder, lambda number: f"{name}_{number:05}.safetensors", content, next_one)
    except OSError as failure:
        raise ValueError(
            f"name: {folder} cannot be written ({failure.strerror or failure}). Make room and run again: the training "
            "is kept."
        ) from failure
    logging.info("pix2pix-zero: saved the student as %s", path)
    return path
