"""Pairs on disk."""

import json
import os

import pytest
import torch
from PIL import Image
from pix2pix_zero.distillation.pairs import PairError, PairFolder, is_held_out, pair_key
from pix2pix_zero.editing.writing import TEMPORARY


def picture(seed: int, size: int = 16) -> torch.Tensor:
    return torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(seed)).float() / 255


@pytest.fixture
def folder(tmp_path) -> PairFolder:
    pairs = PairFolder(tmp_path / "pairs", {"edit": "cat2dog"})
    pairs.begin()
    return pairs


def test_pictures_come_back_as_they_were_to_the_last_bit(folder):
    area = torch.zeros(16, 16)
    area[4:8, 2:5] = 1
    folder.write("a", picture(0), picture(1), area)
    source, edited, mask = folder.read().take([0])
    assert torch.equal(source[0].movedim(0, -1), picture(0))
    assert torch.equal(edited[0].movedim(0, -1), picture(1))
    assert torch.equal(mask[0, 0], area)


def test_a_pair_without_an_area_was_edited_everywhere(folder):
    folder.write("a", picture(0), picture(1), torch.zeros(16, 16))
    folder.write("a", picture(0), picture(1))
    assert folder.read().areas.min() == 255


def test_the_same_pair_saved_twice_is_one_pair(folder):
    for _ in range(2):
        folder.write(pair_key(picture(0), picture(1)), picture(0), picture(1))
    folder.write(pair_key(picture(0), picture(2)), picture(0), picture(2))
    assert len(folder.keys()) == 2


def test_a_pair_whose_writing_was_cut_off_is_not_there_and_leaves_nothing(folder, monkeypatch):
    replace, calls = os.replace, []

    def fail_at_the_last(part, path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("No space left on device")
        replace(part, path)

    monkeypatch.setattr(os, "replace", fail_at_the_last)
    with pytest.raises(OSError, match="No space"):
        folder.write("a", picture(0), picture(1), torch.ones(16, 16))
    assert folder.keys() == []
    assert not [path for path in folder.folder.rglob("*") if path.name.startswith(TEMPORARY)]
    monkeypatch.undo()
    folder.write("a", picture(0), picture(1), torch.ones(16, 16))
    assert folder.keys() == ["a"]


def test_a_pair_that_is_written_anew_is_never_the_old_edit_of_the_new_source(folder, monkeypatch):
    folder.write("a", picture(0), picture(1))
    replace = os.replace

    def fail_at_the_edit(part, path):
        if "edited" in str(path):
            raise OSError("No space left on device")
        replace(part, path)

    monkeypatch.setattr(os, "replace", fail_at_the_edit)
    with pytest.raises(OSError):
        folder.write("a", picture(2), picture(3))
    assert folder.keys() == []


def test_another_teacher_is_refused(folder):
    with pytest.raises(PairError, match="another edit"):
        PairFolder(folder.folder, {"edit": "day2night"}).begin()
    PairFolder(folder.folder, {"edit": "cat2dog"}).begin()
    assert json.loads((folder.folder / "manifest.json").read_text()) == {"edit": "cat2dog"}


def test_unequal_pictures_are_refused_with_their_sizes(folder):
    with pytest.raises(PairError, match="pair a.* 16x16 and 24x24"):
        folder.write("a", picture(0), picture(1, 24))
    assert folder.keys() == []


def test_nan_is_refused(folder):
    broken = picture(1)
    broken[3, 4, 0] = float("nan")
    with pytest.raises(PairError, match="NaN"):
        folder.write("a", picture(0), broken)
    assert folder.keys() == []


def test_a_broken_file_is_named(folder):
    folder.write("a", picture(0), picture(1))
    folder.write("b", picture(0), picture(1))
    path = folder.folder / "edited" / "b.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(PairError, match="b.png.*cannot be read"):
        folder.read()
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(PairError, match="pair b has unequal pictures, 16x16 and 8x8"):
        folder.read()


def test_an_empty_folder_is_refused(folder):
    with pytest.raises(PairError, match="no pairs"):
        folder.read()


def test_a_tenth_is_held_out_by_key_whatever_else_is_there(folder):
    assert 0.08 < sum(is_held_out(str(seed)) for seed in range(2000)) / 2000 < 0.12
    for seed in range(30):
        folder.write(str(seed), picture(seed, 8), picture(seed, 8))
    training, held_out = folder.read().split()
    assert sorted(training.keys + held_out.keys) == folder.keys()
    assert set(held_out.keys) == {key for key in folder.keys() if is_held_out(key)}
    assert held_out.keys
