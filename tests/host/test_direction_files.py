"""Directions in files: saved, loaded, and what is refused."""

import os
import random
from dataclasses import replace

import folder_paths
import pytest
import torch
from pix2pix_zero.devtools.graphs import Graph
from pix2pix_zero.devtools.server import GraphError
from pix2pix_zero.host.text import direction_files
from pix2pix_zero.nodes import direction_files as file_nodes
from pix2pix_zero.nodes import directions as nodes
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, direction_files.FOLDER, ([str(tmp_path / "directions")], {".safetensors"})
    )
    return tmp_path / "directions"


def save(direction, prefix, run_node):
    run_node(file_nodes.Pix2PixZeroSaveDirection, direction=direction, filename_prefix=prefix)


def test_a_saved_direction_comes_back_bit_for_bit(plain_direction, folder, run_node):
    save(plain_direction, "animals/cat2dog", run_node)
    assert direction_files.direction_names() == ["animals/cat2dog_00001_.safetensors"]
    (again,) = run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name="animals/cat2dog_00001_.safetensors")
    assert again.tensors.keys() == plain_direction.tensors.keys()
    assert all(torch.equal(again.tensors[k], plain_direction.tensors[k]) for k in plain_direction.tensors)
    assert torch.equal(again.first_token, plain_direction.first_token)
    described = ("encoder", "source", "target", "count")
    assert [getattr(again, k) for k in described] == [getattr(plain_direction, k) for k in described]


def test_words_that_an_edit_adds_are_saved_too_and_other_files_stay_as_they_were(plain_direction, folder, run_node):
    added = replace(plain_direction, added=torch.randn(1, 2, 8))
    save(plain_direction, "plain", run_node)
    save(added, "added", run_node)
    for name, version, kept in (("plain", "1", plain_direction), ("added", "2", added)):
        path = folder / f"{name}_00001_.safetensors"
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format_version"] == version
            assert ("added_words" in file.keys()) == (name == "added")
        (again,) = run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name=path.name)
        assert kept.added is again.added is None or torch.equal(kept.added, again.added)


def test_saving_again_counts_up_and_leaves_no_other_files(plain_direction, folder, run_node):
    for _ in range(3):
        save(plain_direction, "cat2dog", run_node)
    assert sorted(p.name for p in folder.iterdir()) == [f"cat2dog_0000{i}_.safetensors" for i in (1, 2, 3)]


def test_the_node_says_what_it_saved(plain_direction, folder):
    output = file_nodes.Pix2PixZeroSaveDirection.execute(plain_direction, "animals/cat2dog")
    assert output.ui == {"text": ["Saved cat2dog_00001_.safetensors"]}


def test_a_file_that_appears_meanwhile_is_not_overwritten(plain_direction, folder, run_node, monkeypatch):
    save(plain_direction, "cat2dog", run_node)
    first = (folder / "cat2dog_00001_.safetensors").read_bytes()
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda prefix, root: (str(folder), prefix, 1, "", prefix))
    save(plain_direction, "cat2dog", run_node)
    assert (folder / "cat2dog_00001_.safetensors").read_bytes() == first
    assert (folder / "cat2dog_00002_.safetensors").is_file()


def test_a_save_that_fails_leaves_nothing_behind(plain_direction, folder, run_node, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    for call in ("link", "replace"):
        monkeypatch.setattr(direction_files.os, call, full_disk)
    with pytest.raises(ValueError, match="^filename_prefix: .*No space"):
        save(plain_direction, "animals/dogs/cat2dog", run_node)
    assert not folder.exists()


def test_the_file_system_speaks_in_the_users_words(plain_direction, folder, run_node):
    folder.mkdir()
    (folder / "taken").write_text("a file")
    for prefix, reason in (("a" * 300, "name too long"), (f"new/{'a' * 300}", "name too long"), ("taken/x", "")):
        with pytest.raises(ValueError, match=f"(?i)^filename_prefix: .*cannot be saved in .*{reason}") as error:
            save(plain_direction, prefix, run_node)
        assert str(folder) in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (UnicodeEncodeError("ascii", "고양이", 0, 3, "ordinal not in range(128)"), "'ascii' codec"),
    ],
)
def test_what_the_file_system_refuses_is_named(error, reason, plain_direction, folder, run_node, monkeypatch):
    """A folder that is only to be read, and a system whose names have no such letters."""

    def refuse(*_):
        raise error

    for call in ("link", "replace"):
        monkeypatch.setattr(direction_files.os, call, refuse)
    with pytest.raises(ValueError, match=f"^filename_prefix: .*{reason}") as told:
        save(plain_direction, "new/cat2dog", run_node)
    assert str(folder / "new") in str(told.value) and not folder.exists()


def test_a_folder_that_is_a_link_is_followed(plain_direction, folder, run_node, tmp_path):
    elsewhere = tmp_path / "another disk"
    elsewhere.mkdir()
    folder.mkdir()
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    save(plain_direction, "linked/cat2dog", run_node)
    assert [path.name for path in elsewhere.iterdir()] == ["cat2dog_00001_.safetensors"]
    (folder / "lost").symlink_to(tmp_path / "unplugged", target_is_directory=True)
    with pytest.raises(ValueError, match="^filename_prefix: .*cannot be saved in .*lost"):
        save(plain_direction, "lost/cat2dog", run_node)


@pytest.mark.parametrize("prefix", ["aux/x", "con", "a/NUL.txt", "COM1", "a./x"])
def test_names_that_windows_cannot_make_are_refused_everywhere(prefix, plain_direction, folder, run_node):
    with pytest.raises(ValueError, match="^filename_prefix: Windows"):
        save(plain_direction, prefix, run_node)


def test_a_file_has_the_folders_usual_rights(plain_direction, folder, run_node):
    save(plain_direction, "cat2dog", run_node)
    (folder / "other").touch()
    assert (folder / "cat2dog_00001_.safetensors").stat().st_mode == (folder / "other").stat().st_mode


def test_what_a_killed_save_left_is_cleared_by_a_later_one(plain_direction, folder, run_node):
    folder.mkdir()
    old, new = folder / ".pix2pix_zero_old", folder / ".pix2pix_zero_new"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    save(plain_direction, "cat2dog", run_node)
    assert new.exists() and not old.exists()


@pytest.mark.parametrize("header", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle_is_read(header, plain_direction, folder, run_node):
    """The first bytes of a safetensors file are the length of its header, and these are those of pickles' protocols."""
    for length in range(2000):
        named = replace(plain_direction, source="x" * length)
        if int.from_bytes(direction_files._as_bytes(named)[:8], "little") == header:
            break
    save(named, "cat2dog", run_node)
    content = (folder / "cat2dog_00001_.safetensors").read_bytes()
    assert content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    (again,) = run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name="cat2dog_00001_.safetensors")
    assert again.source == named.source and torch.equal(again.tensors["cond"], named.tensors["cond"])


def test_each_of_100_flipped_bits_of_the_tensors_is_noticed(plain_direction, folder, run_node):
    save(plain_direction, "cat2dog", run_node)
    path = folder / "cat2dog_00001_.safetensors"
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for bit in random.Random(0).sample(range(8 * begin, 8 * len(content)), 100):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="^direction_name: .*damaged"):
            run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name=path.name)


def test_a_file_of_a_release_without_checksums_is_read(plain_direction, folder, run_node):
    save(plain_direction, "cat2dog", run_node)
    _rewrite(folder / "cat2dog_00001_.safetensors", lambda t, m: None)
    run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name="cat2dog_00001_.safetensors")


def test_a_name_of_a_workflow_from_windows_is_valid(plain_direction, folder, run_node):
    save(plain_direction, "animals/cat2dog", run_node)
    node = file_nodes.Pix2PixZeroLoadDirection
    for name in ("animals\\cat2dog_00001_.safetensors", "animals/cat2dog_00001_.safetensors", None):
        assert node.validate_inputs(direction_name=name) is True
    assert "there is no" in node.validate_inputs(direction_name="dog_00001_.safetensors")
    assert "leaves" in node.validate_inputs(direction_name="../x.safetensors")


@pytest.mark.parametrize("name", [None, 3, "missing.safetensors", "../x"])
def test_a_name_without_a_file_has_one_fingerprint_and_is_refused_in_words(name, folder, run_node):
    node = file_nodes.Pix2PixZeroLoadDirection
    assert node.fingerprint_inputs(name) == node.fingerprint_inputs(name)
    with pytest.raises(ValueError, match="^direction_name: "):
        run_node(node, direction_name=name)


BAD_NAMES = ["", "  ", "../evil", "a/../../evil", "/tmp/evil", "..", "..\\evil", "C:\\evil", "what?", "a\x00b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_empty_or_leave_the_folder_are_refused(name, plain_direction, folder, run_node):
    with pytest.raises(ValueError, match="^filename_prefix: "):
        save(plain_direction, name, run_node)
    (folder.parent / "evil.safetensors").write_bytes(b"outside")
    for suffix in ("", ".safetensors"):
        with pytest.raises(ValueError, match="^direction_name: "):
            run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name=name + suffix)
    assert sorted(p.name for p in folder.parent.rglob("*.safetensors")) == ["evil.safetensors"]


def _rewrite(path, change):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    metadata.pop("sha256")
    change(tensors, metadata)
    save_file(tensors, path, metadata)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "header only": lambda path: path.write_bytes(path.read_bytes()[:30]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a direction at all"),
    "zip pickle": lambda path: torch.save({"cond": torch.zeros(1, 77, 32)}, path),
    "bare pickle": lambda path: path.write_bytes(b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}\x94."),
    "foreign": lambda path: save_file({"lora.weight": torch.zeros(2, 2)}, path),
    "foreign with metadata": lambda path: save_file({"w": torch.zeros(2)}, path, {"format": "pt"}),
    "newer version": lambda path: _rewrite(path, lambda t, m: m.update(format_version="3")),
    "no cond": lambda path: _rewrite(path, lambda t, m: t.pop("direction.cond")),
    "not a number": lambda path: _rewrite(path, lambda t, m: t["direction.cond"].fill_(float("nan"))),
    "wrong shape": lambda path: _rewrite(path, lambda t, m: t.update({"direction.cond": torch.zeros(3, 4)})),
    "integers": lambda path: _rewrite(path, lambda t, m: t.update({"direction.cond": torch.zeros(1, 3, 4).int()})),
    "no words": lambda path: _rewrite(path, lambda t, m: t.update(added_words=torch.zeros(1, 0, 8))),
    "words of another width": lambda path: _rewrite(path, lambda t, m: t.update(added_words=torch.zeros(1, 2, 7))),
    "words not numbers": lambda path: _rewrite(
        path, lambda t, m: t.update(added_words=torch.full((1, 2, 8), torch.inf))
    ),
    "no count": lambda path: _rewrite(path, lambda t, m: m.pop("count")),
    "a count in other digits": lambda path: _rewrite(path, lambda t, m: m.update(count="²")),
    "a count of 5000 digits": lambda path: _rewrite(path, lambda t, m: m.update(count="9" * 5000)),
    "a scalar": lambda path: _rewrite(path, lambda t, m: t.update({"direction.x": torch.tensor(1.0)})),
    "numbers of 8 bits": lambda path: _rewrite(
        path, lambda t, m: t.update({"direction.cond": torch.zeros(1, 77, 8).to(torch.float8_e4m3fn)})
    ),
    "nothing": lambda path: _rewrite(path, lambda t, m: t.update({"direction.cond": torch.zeros(1, 0, 8)})),
    "a first token not a number": lambda path: _rewrite(path, lambda t, m: t["first_token"].fill_(torch.nan)),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_are_no_directions_are_refused(damage, plain_direction, folder, run_node):
    save(plain_direction, "cat2dog", run_node)
    path = folder / "cat2dog_00001_.safetensors"
    DAMAGE[damage](path)
    with pytest.raises(ValueError, match='^direction_name: .*"cat2dog_00001_.safetensors"'):
        run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name=path.name)


def test_a_pickle_is_not_even_opened_as_one(folder, run_node):
    folder.mkdir()
    torch.save({"cond": torch.zeros(1, 77, 32)}, folder / "cat2dog.pt")
    torch.save({"cond": torch.zeros(1, 77, 32)}, folder / "cat2dog.safetensors")
    with pytest.raises(ValueError, match="^direction_name: .*not a .safetensors"):
        run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name="cat2dog.pt")
    with pytest.raises(ValueError, match="^direction_name: .*pickle"):
        run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name="cat2dog.safetensors")
    assert direction_files.direction_names() == ["cat2dog.safetensors"]


def test_the_cache_notices_a_changed_file(plain_direction, folder, run_node):
    save(plain_direction, "cat2dog", run_node)
    name = "cat2dog_00001_.safetensors"
    before = file_nodes.Pix2PixZeroLoadDirection.fingerprint_inputs(direction_name=name)
    assert before == file_nodes.Pix2PixZeroLoadDirection.fingerprint_inputs(direction_name=name)
    _rewrite(folder / name, lambda t, m: t["direction.cond"].mul_(2))
    assert before != file_nodes.Pix2PixZeroLoadDirection.fingerprint_inputs(direction_name=name)


def test_the_folder_is_registered_for_safetensors_beside_folders_of_the_users(monkeypatch):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {direction_files.FOLDER: (["/mine"], set())})
    direction_files.register_directions_folder()
    direction_files.register_directions_folder()
    paths, extensions = folder_paths.folder_names_and_paths[direction_files.FOLDER]
    assert paths[0] == "/mine" and len(paths) == 2
    assert paths[1].replace("\\", "/").endswith("models/pix2pix_zero/directions")
    assert extensions == {".safetensors"}


@pytest.mark.parametrize("foreign", [None, {}, torch.zeros(1), "a direction"])
def test_what_is_no_direction_is_refused_in_words(foreign, plain_direction, folder, run_node):
    words = "and nothing that Edit Direction made"
    with pytest.raises(ValueError, match=f"^direction: .*{words}"):
        run_node(nodes.Pix2PixZeroApplyDirection, conditioning=[[torch.zeros(1, 77, 8), {}]], direction=foreign)
    with pytest.raises(ValueError, match=f"^direction: .*{words}"):
        save(foreign, "x", run_node)
    with pytest.raises(ValueError, match=f"^direction_b: .*{words}"):
        run_node(nodes.Pix2PixZeroCombineDirections, direction_a=plain_direction, direction_b=foreign)


def test_the_server_takes_the_name_of_a_workflow_from_windows(server):
    graph = Graph()
    clip = graph.add("Pix2PixZeroDemoModel")[1]
    lines = {"source_sentences": "a cat", "target_sentences": "a dog"}
    made = graph.add("Pix2PixZeroEditDirectionFromSentences", clip=clip, **lines)
    graph.add("Pix2PixZeroSaveDirection", direction=made[0], filename_prefix="animals/cat2dog")
    info = server.object_info()
    server.run(graph.api(info))

    def load(name):
        graph = Graph()
        loaded = graph.add("Pix2PixZeroLoadDirection", direction_name=name)
        kept = graph.add("Pix2PixZeroSaveDirection", direction=loaded[0], filename_prefix="again")
        return server.run(graph.api(info))[kept.key]["text"]

    assert load("animals\\cat2dog_00001_.safetensors") == ["Saved again_00001_.safetensors"]
    with pytest.raises(GraphError, match="there is no"):
        load("animals\\missing.safetensors")
