"""How far it is from a node to the mathematics: what a reader of a guided edit has to open."""

import functools
import sys
from pathlib import Path

import pix2pix_zero
import pytest
import torch
from pix2pix_zero.demo_model.loader import load_demo_model
from pix2pix_zero.nodes.caption import Pix2PixZeroCaption, Pix2PixZeroLoadCaptioner
from pix2pix_zero.nodes.directions import Pix2PixZeroApplyDirection, Pix2PixZeroEditDirection
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler
from pix2pix_zero.nodes.sockets import with_defaults
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


class Way:
    """`files`: those of the pack that were entered. `deepest`: those of the frames that stood where matched maps are computed."""

    def __init__(self):
        self.files, self.deepest = set(), []

    @torch.inference_mode()
    def run(self, node, **inputs):
        """The first outputs of a node."""
        inputs = with_defaults(node, inputs)
        if node.GET_SCHEMA().is_input_list:
            inputs = {name: [value] for name, value in inputs.items()}
        sys.setprofile(self._watch)
        try:
            output = node.execute(**inputs)
        finally:
            sys.setprofile(None)
        return output.result[0]

    def _watch(self, frame, event, argument):
        if event == "call" and (name := file_of(frame)) is not None:
            self.files.add(name)
        if event == "call" and frame.f_code.co_name == "attention_maps":
            self.deepest = max(self.deepest, own_frames(frame), key=len)


@pytest.fixture(scope="module")
def guided_edit():
    model, way = loaded_small_model(), Way()
    inversion, texts = invert(model), dict(positive=conditioning(seed=1), negative=conditioning())
    way.run(Pix2PixZeroKSampler, model=model, inversion=inversion, cfg=2.0, guidance_strength=0.1, **texts)
    return way


def test_a_guided_edit_enters_few_files(guided_edit):
    files = guided_edit.files
    assert {"nodes/sampler.py", "editing/guidance.py", "attention_patches/plug_and_play.py"} <= files
    assert len(files) <= 17, sorted(files)


def test_few_frames_lie_between_the_node_and_the_softmax(guided_edit):
    frames = guided_edit.deepest
    assert frames[0] == "attention_patches/attention.py" and frames[-2:] == ["nodes/sampler.py", "host/running.py"]
    assert len(frames) <= 16, frames[::-1]
    assert len(set(frames)) <= 8, sorted(set(frames))


def test_the_whole_way_from_caption_to_picture_enters_few_files():
    way = Way()
    with torch.inference_mode():
        model, clip, vae = load_demo_model()
        picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
        text = clip.encode_from_tokens_scheduled(clip.tokenize("a photo of a cat"))
        latent = {"samples": vae.encode(picture)}
    captioner = way.run(Pix2PixZeroLoadCaptioner)
    way.run(Pix2PixZeroCaption, captioner=captioner, image=picture)
    (inversion,) = way.run(Pix2PixZeroInversion, model=model, positive=text, latent_image=latent, steps=3)
    direction = way.run(Pix2PixZeroEditDirection, clip=clip, source="cat", target="dog")
    moved = way.run(Pix2PixZeroApplyDirection, conditioning=text, direction=direction)
    way.run(Pix2PixZeroKSampler, model=model, inversion=inversion, positive=moved, negative=text, guidance_strength=0.1)
    assert {"host/networks/captioner.py", "editing/sentences.py", "editing/inversion.py"} <= way.files
    assert len(way.files) <= 30, " ".join(sorted(way.files))
