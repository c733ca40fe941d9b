"""How far it is from a node to the mathematics: what a reader of a guided edit has to open."""

import functools
import sys
from pathlib import Path

import pix2pix_zero
import pytest
import torch
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler
from small_edit import invert
from small_unet import conditioning, loaded_small_model

PACK = Path(pix2pix_zero.__file__).resolve().parent
OUTSIDE = ("tests", "benchmarks", "devtools")


def file_of(frame) -> str | None:
    """The pack's own file that a frame is in."""
    return own_file(frame.f_code.co_filename)


@functools.cache
def own_file(name: str) -> str | None:
    path = Path(name).resolve()
    if name.startswith("<") or not path.is_relative_to(PACK):  # such as <string>
        return None
    inside = path.relative_to(PACK)
    # ComfyUI and the Python environments of its versions are in folders that begin with a dot.
    return None if inside.parts[0] in OUTSIDE or inside.parts[0][0] == "." else inside.as_posix()


def own_frames(frame) -> list[str]:
    files = []
    while frame is not None:
        files.append(file_of(frame))
        frame = frame.f_back
    return [name for name in files if name is not None]


@pytest.fixture(scope="module")
def guided_edit():
    """(the files that a guided edit enters, the files of the frames that stand where matched maps are computed)."""
    model = loaded_small_model()
    inversion, text = invert(model), conditioning(seed=1)
    entered, deepest = set(), []

    def watch(frame, event, argument):
        if event == "call" and (name := file_of(frame)) is not None:
            entered.add(name)
        if event == "call" and frame.f_code.co_name == "attention_maps":
            deepest[:] = max(deepest, own_frames(frame), key=len)

    knobs = dict(cfg=[2.0], guidance_strength=[0.1], start_percent=[0.0], end_percent=[1.0], preset=["default"])
    sys.setprofile(watch)
    try:
        with torch.inference_mode():
            Pix2PixZeroKSampler.execute(
                model=[model],
                inversion=[inversion],
                positive=[text],
                negative=[conditioning()],
                **knobs,
            )
    finally:
        sys.setprofile(None)
    return entered, deepest


def test_a_guided_edit_enters_few_files(guided_edit):
    entered, _ = guided_edit
    assert {"nodes/sampler.py", "editing/guidance.py", "attention_patches/plug_and_play.py"} <= entered
    assert len(entered) <= 17, sorted(entered)


def test_few_frames_lie_between_the_node_and_the_softmax(guided_edit):
    _, frames = guided_edit
    assert frames[0] == "attention_patches/attention.py" and frames[-2] == "nodes/sampler.py"
    assert len(frames) <= 16, frames[::-1]
    assert len(set(frames)) <= 8, sorted(set(frames))
