"""Stage 1: the training pictures. Training seeds start at a million; seeds below are held out."""

import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..scene import SIZE, STYLES, Scene, sample_scene
from ..scene_renders import render

FIRST_TRAINING_SEED = 1_000_000
HELD_OUT = 256


def training_scene(index: int) -> Scene:
    return sample_scene(FIRST_TRAINING_SEED + index)


def training_scene_of_hard_styles(index: int) -> Scene:
    """The same with flat drawings in one of five, where they are three of five: the other styles are harder to decode."""
    flat, sketch, pastel = STYLES
    return replace(training_scene(index), style=(flat, sketch, pastel, sketch, pastel)[index % 5])


def _render(index: int) -> np.ndarray:
    return render(training_scene(index))


def _render_hard(index: int) -> np.ndarray:
    return render(training_scene_of_hard_styles(index))


def render_training_set(path: Path, count: int, processes: int, hard_styles: bool = False) -> None:
    """Write `count` pictures as one uint8 array [count, 128, 128, 3] in `path` (.npy)."""
    draw: Callable[[int], np.ndarray] = _render_hard if hard_styles else _render
    pictures = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, SIZE, SIZE, 3))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for index, picture in enumerate(pool.imap(draw, range(count), chunksize=100)):
            pictures[index] = picture
            if index % 10000 == 0:
                logging.info("rendered %d of %d", index, count)
    pictures.flush()


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def held_out_pixels(count: int = HELD_OUT) -> Tensor:
    """Pictures of seeds 0..count-1, which no stage trains on: float32 [count, 3, 128, 128] in -1..1."""
    return to_pixels(np.stack([render(sample_scene(seed)) for seed in range(count)]))
