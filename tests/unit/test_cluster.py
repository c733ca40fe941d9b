"""`cluster` without Ray, torch or a server: workflows, keys, and the pictures of a run."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from cluster_workflows import BLUR, EDIT, PAIR, SAVE, SOURCE, changed, written
from PIL import Image
from pix2pix_zero.cluster.commands import main
from pix2pix_zero.cluster.connection import cause, join
from pix2pix_zero.cluster.pictures import Pictures, is_cut_off, list_pictures
from pix2pix_zero.cluster.results import Results
from pix2pix_zero.cluster.workflow import ClusterError, read_workflow
from pix2pix_zero.devtools.hosts import ROOT


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


@pytest.fixture
def connections(monkeypatch):
    """`connections(failures)`: the addresses of all attempts at a Ray that fails so many times at first."""

    def make(failures: int) -> list[str]:
        attempts: list[str] = []

        def init(address: str, **_: object) -> None:
            attempts.append(address)
            if len(attempts) <= failures:
                raise ConnectionAbortedError(TRACEBACK)

        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
        monkeypatch.setitem(sys.modules, "grpc", SimpleNamespace(RpcError=type("RpcError", (Exception,), {})))
        return attempts

    return make


TRACEBACK = """Initialization failure from server:
Traceback (most recent call last):
  File "proxier.py", line 780, in Datapath
    raise RuntimeError(
RuntimeError: Proxy failed to Connect to backend!

"""


def test_a_cluster_that_is_too_busy_to_serve_at_once_is_asked_again_in_words(connections, capsys):
    attempts = connections(2)
    join("ray://head:10001", {})
    assert attempts == ["ray://head:10001"] * 3
    first, second = capsys.readouterr().out.splitlines()
    assert first == "Not connected (RuntimeError: Proxy failed to Connect to backend!). Trying again (1 of 3) ..."
    assert second.endswith("Trying again (2 of 3) ...")


def test_a_cluster_that_never_serves_is_given_up(connections):
    attempts = connections(100)
    words = "ray://head:10001 does not take us in: RuntimeError: Proxy failed to Connect to backend!. Look into"
    with pytest.raises(ClusterError, match=re.escape(words)):
        join("ray://head:10001", {})
    assert len(attempts) == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (TRACEBACK, "RuntimeError: Proxy failed to Connect to backend!"),
        ('ray::Worker.edit()\n  File "worker.py", line 1, in edit\nOSError: disk full\n', "OSError: disk full"),
        ("The actor died.\n\tclass_name: Worker\n\tpid: 7", "The actor died."),
        ("", "RuntimeError"),
    ],
)
def test_rays_words_are_cut_to_the_line_that_says_what_happened(words, told):
    assert cause(RuntimeError(words)) == told
