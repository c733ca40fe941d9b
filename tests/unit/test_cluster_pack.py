"""What `cluster pack` writes, read as the other trainers read it."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from cluster_workflows import names
from PIL import Image
from pix2pix_zero.cluster import pack as packing
from pix2pix_zero.cluster.commands import main


@pytest.fixture
def data_set(tmp_path) -> Path:
    """Twenty pairs of Save Edit Pair's own writer; the even ones have a mask, the first ten a caption."""
    import torch
    from pix2pix_zero.distillation.pairs import PairFolder

    folder = PairFolder(tmp_path / "pairs")
    folder.begin()
    for number in range(20):
        colour = torch.full((4, 6, 3), number / 255)
        mask = torch.ones(4, 6) if number % 2 == 0 else None
        folder.write(f"key{number:02}", colour, 1 - colour, mask, "a dog" if number < 10 else "")
    (folder.folder / "source" / "torn.png").write_bytes(b"half a pair")
    return folder.folder


def packed(data_set: Path, format: str, *more: str) -> tuple[int, Path]:
    out = data_set.parent / "packed"
    return main(["pack", "--pairs", str(data_set), "--out", str(out), "--format", format, *more]), out


def test_webdataset_samples_are_the_files_of_each_pair(data_set, monkeypatch):
    monkeypatch.setattr(packing, "PAIRS_A_SHARD", 8)
    status, out = packed(data_set, "webdataset")
    assert status == 0 and names(out) == ["pairs-000000.tar", "pairs-000001.tar", "pairs-000002.tar"]
    samples: dict[str, dict[str, bytes]] = {}
    order = []
    for path in sorted(out.iterdir()):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")  # webdataset's own rule: up to the first dot
                samples.setdefault(key, {})[name] = tar.extractfile(member).read()
                order.append(key)
    assert order == sorted(order), "the files of a sample lie together"
    assert sorted(samples) == [f"key{number:02}" for number in range(20)]
    assert sorted(samples["key02"]) == ["edited.png", "mask.png", "source.png", "txt"]
    assert sorted(samples["key11"]) == ["edited.png", "source.png"]
    for kind in ("source", "edited"):
        assert samples["key07"][f"{kind}.png"] == (data_set / kind / "key07.png").read_bytes()
    assert samples["key02"]["txt"] == b"a dog"


def test_img2img_turbo_reads_its_layout(data_set):
    """As its PairedDataset does: the captions name the files, which are in A and in B."""
    from pix2pix_zero.distillation.pairs import is_held_out

    status, out = packed(data_set, "img2img-turbo", "--caption", "some dog")
    assert status == 0
    seen = {}
    for split in ("train", "test"):
        captions = json.loads((out / f"{split}_prompts.json").read_text())
        for name, caption in captions.items():
            source, edited = (Image.open(out / f"{split}_{side}" / name) for side in "AB")
            assert source.mode == edited.mode == "RGB"
            assert np.asarray(source)[0, 0, 0] + np.asarray(edited)[0, 0, 0] == 255
            seen[name.removesuffix(".png")] = (split, caption)
        assert {path.name for side in "AB" for path in (out / f"{split}_{side}").iterdir()} == set(captions)
    assert sorted(seen) == [f"key{number:02}" for number in range(20)]
    assert {key for key, (split, _) in seen.items() if split == "test"} == {key for key in seen if is_held_out(key)}
    assert seen["key03"][1] == "a dog" and seen["key15"][1] == "some dog"


@pytest.mark.parametrize(
    ("format", "spoil", "words"),
    [
        ("img2img-turbo", lambda folder: None, "10 pairs have no caption"),
        ("webdataset", lambda folder: (folder.parent / "packed").mkdir(), "exists already"),
        ("webdataset", lambda folder: folder.rename(folder.parent / "elsewhere"), "there are no pairs"),
    ],
)
def test_what_cannot_be_packed_is_told_and_leaves_nothing(data_set, capsys, format, spoil, words):
    spoil(data_set)
    status, out = packed(data_set, format)
    assert status == 1 and words in capsys.readouterr().err
    assert not list(out.parent.glob(".*.part")) and not (out.exists() and list(out.iterdir()))


def test_a_full_disk_leaves_no_half_of_a_packed_folder(data_set, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packing.shutil, "copyfile", full)
    status, out = packed(data_set, "img2img-turbo", "--caption", "x")
    assert status == 1 and "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in out.parent.iterdir()) == ["pairs"]


def test_the_pairs_folder_is_what_ai_toolkit_takes_as_target_and_control(data_set):
    """By its rules: every picture of the targets that is not hidden, its control and caption under the same stem."""
    targets = [path for path in (data_set / "edited").rglob("*") if path.suffix in (".jpg", ".jpeg", ".png", ".webp")]
    assert len([path for path in targets if not path.name.startswith(".")]) == 20
    for target in targets:
        assert (data_set / "source" / f"{target.stem}.png").is_file()
    assert (data_set / "edited" / "key03.txt").read_text().strip() == "a dog"
