"""Crafted model folders from a seed: each is refused in words that name its socket, or is read, quickly and never as code."""

import json
import random
import shutil
import time

import pytest
import torch
from pix2pix_zero.host.networks.captioner import load_captioner
from pix2pix_zero.host.networks.metric_models import load_clip, load_dino

COUNT, SEED = 30, 20261128
LONGEST = 5.0  # seconds of work; 3000 layers took 67
ODD = [None, True, 0, -1, 1.5, 10**9, 2**70, "small", "", [], {}, [1, 2], {"a": 1}, "\ud83d", "x" * 100_000]
KINDS = {"model_name": "blip", "clip_model": "clip", "dino_model": "dino"}


def places(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def craft(folder, draw):
    """Change one file of a folder; what was done."""
    file = draw.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
    content = file.read_bytes()
    if file.suffix == ".json" and draw.random() < 0.75:
        value = json.loads(content)
        # the tokenizer's words would be nearly all of its places
        path = draw.choice([place for place in places(value) if len(place) < 4])
        new = draw.choice(ODD)
        file.write_text(json.dumps(changed(value, path, new)))
        return f"{file.name}: {'.'.join(map(str, path))} = {new!r:.30}"
    start = draw.randrange(len(content))
    cut = draw.choice((content[:start], content[:start] + draw.randbytes(8) + content[start + 8 :], b"", b"\x80\x04."))
    file.write_bytes(cut)
    return f"{file.name}: {len(cut)} bytes of {len(content)}"


@pytest.fixture(scope="module")
def whole(blip_folder, judge_folder):
    return {"blip": blip_folder, "clip": judge_folder / "clip", "dino": judge_folder / "dino"}


@pytest.fixture
def load(blip_models, judge_models):
    """`load(socket)`: read the folder of a kind as its node does."""
    return {
        "model_name": (blip_models / "tiny", lambda: load_captioner("tiny")),
        "clip_model": (judge_models / "clip", lambda: load_clip("clip", False)),
        "dino_model": (judge_models / "dino", lambda: load_dino("dino", False)),
    }


@torch.inference_mode()
def test_crafted_folders_are_refused_by_their_socket_or_read(whole, load):
    draw, wrong, refused = random.Random(SEED), [], 0
    for number in range(COUNT):
        socket = draw.choice(list(KINDS))
        folder, read = load[socket]
        shutil.rmtree(folder)
        shutil.copytree(whole[KINDS[socket]], folder)
        what = f"{number} {socket} {craft(folder, draw)}"
        begin = time.thread_time()
        try:
            read()
        except ValueError as error:
            refused += 1
            if not str(error).startswith(f"{socket}: "):
                wrong.append(f"{what}: no socket is named: {error!s:.200}")
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {error!s:.200}")
        if time.thread_time() - begin > LONGEST:
            wrong.append(f"{what}: it took {time.thread_time() - begin:.0f} s")
    assert not wrong, "\n".join([f"{len(wrong)} of {COUNT}", *wrong])
    assert refused > COUNT / 3, "most of what was crafted is harmless"
