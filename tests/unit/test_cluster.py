"""`cluster` without Ray, torch or a server: workflows, keys, the folder of results, and what pack writes."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pix2pix_zero.cluster import pack as packing
from pix2pix_zero.cluster import results as folder_of_results
from pix2pix_zero.cluster.commands import main
from pix2pix_zero.cluster.pictures import Pictures, is_cut_off, list_pictures
from pix2pix_zero.cluster.results import Results
from pix2pix_zero.cluster.workflow import ClusterError, Workflow, read_workflow
from pix2pix_zero.devtools.hosts import ROOT

SOURCE = {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "Source"}}
BLUR = {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "sigma": 1.5}, "_meta": {"title": "soft"}}
SAVE = {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}}
PAIR = {"class_type": "Pix2PixZeroSavePair", "inputs": {"source": ["1", 0], "edited": ["2", 0], "dataset": "mine"}}
EDIT = {"1": SOURCE, "2": BLUR, "3": SAVE}


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "w.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def workflow(tmp_path) -> Workflow:
    return read_workflow(written(tmp_path, EDIT))


@pytest.fixture
def pairs_workflow(tmp_path) -> Workflow:
    return read_workflow(written(tmp_path, {"1": SOURCE, "2": BLUR, "3": PAIR}))


def test_the_program_imports_neither_ray_nor_torch_nor_comfyui_before_it_has_to():
    program = (
        "import runpy, sys\nsys.argv = ['cluster', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'cluster')!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        "print(sorted({'ray', 'torch', 'numpy', 'comfy', 'requests', 'PIL'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/").stdout
    assert "pairs" in told and told.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ([], "is no workflow"),
        ({}, "is no workflow"),
        ({"1": {"class_type": "X"}}, "is no workflow"),
        ({"nodes": [], "links": []}, "as the browser saves it. Export it with Workflow > Export"),
        (
            {"1": {**SOURCE, "_meta": {"title": "Load"}}, "2": BLUR, "3": SAVE},
            "no node of this kind: Load Image titled 'source'",
        ),
        ({**EDIT, "4": SOURCE}, "2 nodes of this kind: Load Image titled"),
        ({"1": SOURCE, "2": BLUR}, "no node of this kind: Save Edit Pair or Save Image"),
        ({**EDIT, "4": SAVE}, "2 nodes of this kind: Save Edit Pair or Save Image"),
        ({**EDIT, "4": PAIR, "5": PAIR}, "2 nodes of this kind: Save Edit Pair"),
        ({"1": SOURCE, "3": SAVE}, "lacks node 2"),
        ({**EDIT, "2": {**BLUR, "inputs": {"image": "b.png"}}}, "does not depend on the Load Image titled"),
    ],
)
def test_a_workflow_that_cannot_be_used_is_told_in_one_line(tmp_path, content, words):
    with pytest.raises(ClusterError, match=re.escape(words)) as told:
        read_workflow(written(tmp_path, content))
    assert "\n" not in str(told.value) and str(told.value).startswith("--workflow: ")


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ClusterError, match="No such file"):
        read_workflow(tmp_path / "none.json")


def test_only_what_the_save_node_needs_is_run(tmp_path):
    extra = {
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
        "5": {"class_type": "X", "inputs": {}},
    }
    assert list(read_workflow(written(tmp_path, {**EDIT, **extra})).graph) == ["1", "2", "3"]


def test_a_pair_goes_before_a_picture_where_a_workflow_saves_both(tmp_path):
    assert read_workflow(written(tmp_path, {**EDIT, "4": PAIR})).save == "4"


def test_the_prompt_loads_the_uploaded_picture_and_leaves_nothing_in_the_servers_output(workflow):
    before = copy.deepcopy(workflow.graph)
    prompt = workflow.prompt("up.png [temp]")
    assert prompt["1"]["inputs"]["image"] == "up.png [temp]"
    assert prompt["3"]["class_type"] == "PreviewImage" and prompt["3"]["inputs"] == {"images": ["2", 0]}
    assert workflow.graph == before


def test_pairs_go_into_a_data_set_of_the_workflow_s_own(pairs_workflow):
    prompt = pairs_workflow.prompt("up.png [temp]")
    assert prompt["3"]["inputs"] == {**PAIR["inputs"], "dataset": f"cluster-{pairs_workflow.digest[:12]}"}


def changed(**inputs: object) -> dict:
    return {**EDIT, "2": {**BLUR, "inputs": {**BLUR["inputs"], **inputs}}}


def test_the_key_is_of_the_picture_and_of_all_that_decides_the_result(tmp_path, workflow):
    def key(content, picture=b"p") -> str:
        return read_workflow(written(tmp_path, content)).key(picture)

    own = workflow.key(b"p")
    assert re.fullmatch("[0-9a-f]{64}", own)
    assert own == hashlib.sha256(hashlib.sha256(b"p").digest() + bytes.fromhex(workflow.digest)).hexdigest()
    same = {
        "3": {**SAVE, "inputs": {**SAVE["inputs"], "filename_prefix": "other"}},
        "2": {**BLUR, "_meta": {"title": "other"}},
        "1": {**SOURCE, "inputs": {"image": "other.png", "upload": "image"}},
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    assert key({**EDIT, **same}) == own
    assert (
        len({own, key(EDIT, b"q"), key(changed(sigma=2.0)), key({**EDIT, "2": {**BLUR, "class_type": "Other"}})}) == 4
    )


def names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    )


def test_pictures_are_kept_under_their_name_and_key_and_known_again(tmp_path, workflow):
    out, key = tmp_path / "out", workflow.key(b"p")
    with Results(out, workflow) as results:
        assert key not in results
        results.commit(key, Path("my-cat.jpg"), [{"edited": b"1"}, {"edited": b"2"}])
        assert key in results
    first = f"my-cat-{key[:16]}.png"
    assert names(out) == ["manifest.json", first, f"my-cat-{key[:16]}_2.png"]
    assert (out / first).read_bytes() == b"1"
    with Results(out, workflow) as results:
        assert key in results and workflow.key(b"q") not in results


def test_pairs_are_kept_in_the_layout_of_save_edit_pair(tmp_path, pairs_workflow):
    from pix2pix_zero.distillation.pairs import PairFolder

    out, key = tmp_path / "out", pairs_workflow.key(b"p")
    png = (tmp_path / "x.png").as_posix()
    Image.new("RGB", (4, 4)).save(png)
    content = Path(png).read_bytes()
    with Results(out, pairs_workflow) as results:
        results.commit(
            key, Path("a.png"), [{"source": content, "edited": content, "mask": content, "caption": b"dog\n"}]
        )
    assert PairFolder(out).keys() == [key] and len(PairFolder(out).read()) == 1
    assert names(out) == sorted(
        ["manifest.json", f"edited/{key}.txt", *(f"{kind}/{key}.png" for kind in ("edited", "mask", "source"))]
    )
    with Results(out, pairs_workflow) as results:
        assert key in results


def test_half_a_pair_is_not_there_and_what_a_killed_run_left_goes(tmp_path, pairs_workflow):
    out, key = tmp_path / "out", pairs_workflow.key(b"p")
    with Results(out, pairs_workflow):
        (out / "source" / f"{key}.png").write_bytes(b"1")
        (out / "edited" / f".{key}.png.part").write_bytes(b"1")
    with Results(out, pairs_workflow) as results:
        assert key not in results
    assert not list(out.rglob("*.part"))


def test_another_workflow_is_refused_and_changes_nothing(tmp_path, workflow):
    out = tmp_path / "out"
    with Results(out, workflow) as results:
        results.fail("k", Path("a.png"), ["w"])
    before = names(out)
    with (
        pytest.raises(ClusterError, match="made by another workflow"),
        Results(out, read_workflow(written(tmp_path, changed(sigma=2)))),
    ):
        pass
    assert names(out) == before
    (out / "manifest.json").write_text("{")
    with pytest.raises(ClusterError, match="made by another workflow"), Results(out, workflow):
        pass


def test_a_folder_of_other_pictures_is_refused(tmp_path, workflow):
    (tmp_path / "mine.png").touch()
    with pytest.raises(ClusterError, match="already holds pictures"), Results(tmp_path, workflow):
        pass


def test_two_runs_into_one_folder_are_refused_until_the_first_has_ended(tmp_path, workflow):
    out = tmp_path / "out"
    with Results(out, workflow):
        with pytest.raises(ClusterError, match="another run writes"), Results(out, workflow):
            pass
    with Results(out, workflow):
        pass


def test_a_full_disk_leaves_nothing_half_written_and_the_next_run_goes_on(tmp_path, pairs_workflow, monkeypatch):
    out, key = tmp_path / "out", pairs_workflow.key(b"p")
    pair = {"source": b"s", "edited": b"e", "mask": b"m"}

    def full(source, target):
        if Path(target).parent.name == "edited":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(source, target)

    with Results(out, pairs_workflow) as results:
        with (
            monkeypatch.context() as patch,
            pytest.raises(ClusterError, match="No space left on device.*Nothing is half-written"),
        ):
            patch.setattr(folder_of_results.os, "replace", full)
            results.commit(key, Path("a.png"), [pair])
        assert key not in results
    assert not list(out.rglob("*.part")) and not list((out / "edited").iterdir())
    with Results(out, pairs_workflow) as results:
        assert key not in results
        results.commit(key, Path("a.png"), [pair])
        assert key in results


def test_what_failed_is_listed_and_forgotten_by_the_next_run(tmp_path, workflow):
    out = tmp_path / "out"
    with Results(out, workflow) as results:
        results.fail("k", Path("a.png"), ["one", "two", "drei ä"])
    assert json.loads((out / "failed.jsonl").read_text("utf-8")) == {
        "picture": "a.png",
        "key": "k",
        "words": ["one", "two", "drei ä"],
    }
    with Results(out, workflow):
        assert not (out / "failed.jsonl").exists()


def test_what_was_left_out_is_not_made_again_even_if_the_last_line_was_cut_off(tmp_path, pairs_workflow):
    out, keys = tmp_path / "out", [pairs_workflow.key(content) for content in (b"p", b"q")]
    with Results(out, pairs_workflow) as results:
        for key in keys:
            results.commit(key, Path("a.png"), [])
    path = out / "left_out.jsonl"
    path.write_text(path.read_text()[:-9])
    with Results(out, pairs_workflow) as results:
        assert keys[0] in results and keys[1] not in results
        results.commit(keys[1], Path("a.png"), [])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == keys


def test_pictures_come_by_name_with_numbers_counted(tmp_path):
    for name in ("10.png", "2.png", "b.JPG", "a.webp", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "deep.png").mkdir()
    assert [path.name for path in list_pictures(tmp_path)] == ["2.png", "10.png", "a.webp", "b.JPG"]


@pytest.mark.parametrize(("folder", "words"), [("empty", "there is no picture in"), ("none", "cannot be read")])
def test_a_folder_without_pictures_is_told(tmp_path, folder, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClusterError, match=f"--pictures: .*{words}"):
        list_pictures(tmp_path / folder)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.webp", {}),
        ("a.jpg", {}),
        ("a.jpg", {"progressive": True}),
        ("a.jpg", {"exif": b"Exif\0\0\xff\xd9"}),
    ],
)
def test_a_file_that_was_cut_off_is_recognized(tmp_path, name, options):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name, **options)
    content = (tmp_path / name).read_bytes()
    assert not is_cut_off(content) and not is_cut_off(content + b"a trailer")
    assert all(is_cut_off(content[:end]) for end in (len(content) // 2, len(content) - 20))


@pytest.fixture
def three(tmp_path, workflow):
    """(pictures, out): three files, two of them equal, and an empty one."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, content in (("1.png", b"p"), ("2.png", b"p"), ("3.png", b"q"), ("4.png", b"")):
        (folder / name).write_bytes(content)
    with Results(out, workflow) as results:
        yield Pictures(list_pictures(folder), workflow, results), out


def test_equal_pictures_are_handed_out_once_and_empty_ones_are_listed(three):
    pictures, out = three
    handed = [pictures.take("a", {"a"}) for _ in range(3)]
    assert [taken and taken[1] for taken in handed] == [b"p", b"q", None]
    assert (pictures.there, pictures.failed, len(pictures)) == (1, 1, 0)
    assert json.loads((out / "failed.jsonl").read_text())["words"] == ["its end is missing"]


def test_a_picture_that_failed_goes_to_another_server_and_is_given_up_after_three_tries(three):
    pictures, out = three
    task, _ = pictures.take("a", {"a", "b"})
    for server, other in (("a", "b"), ("b", "a")):
        task.words.append(f"{server} says no")
        task.failed_by.add(server)
        pictures.put_back(task)
        if server == "a":
            assert pictures.take("a", {"a", "b"})[0] is not task
            assert pictures.take("b", {"a", "b"})[0] is task
    assert pictures.take("a", {"a", "b"})[0] is task, "both have failed at it"
    task.words.append("a says no")
    pictures.put_back(task)
    lines = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert ["a says no", "b says no", "a says no"] in [line["words"] for line in lines]


def test_without_ray_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    asked = ["pairs", "--workflow", "w", "--pictures", "p", "--out", str(tmp_path / "out"), "--servers", "http://a"]
    assert main(asked) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "python -m venv ray-env" in told and "requirements.txt" in told
    assert not (tmp_path / "out").exists()


# --- pack ---------------------------------------------------------------------------------------------------------------


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
