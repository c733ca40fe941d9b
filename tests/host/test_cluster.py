"""Eight scenes on two real servers while what runs is killed: nothing is lost, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from cluster_runs import Program, cluster_python, edit_workflow, pixels, presses_ctrl_c, ray_head, write_scenes
from PIL import Image
from pix2pix_zero.devtools import server as servers
from pix2pix_zero.editing.writing import TEMPORARY

SCENES = 8
# They report the death of their parent to a Ray that is dead too, and end a minute later.
RAYS_OWN = ("ray::Dash", "ray::Runt")


@pytest.fixture(scope="module")
def python() -> Path:
    return cluster_python()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with pictures, a workflow and a ComfyUI base directory that holds the pack."""
    work = tmp_path_factory.mktemp("cluster")
    write_scenes(work / "pictures", SCENES)
    (work / "edit.json").write_text(json.dumps(edit_workflow()))
    with servers.base_directory(work / "base"):
        return work


@pytest.fixture(scope="module")
def command(work, quick_environment):
    """`command(out)`: the arguments of a run on two servers of its own."""

    def arguments(out: Path) -> list[object]:
        here = quick_environment
        theirs = ["--base-directory", work / "base", "--cpu", "--disable-api-nodes"]
        spawn = ["--spawn", 2, "--comfyui", here.comfyui.path, "--python", here.python]
        return [*asked(work, out), *spawn, "--", *theirs]

    return arguments


def asked(work: Path, out: Path) -> list[object]:
    return ["pairs", "--workflow", work / "edit.json", "--pictures", work / "pictures", "--out", out]


@pytest.fixture(scope="module")
def one_server(work, start_server):
    """A server that somebody else has started."""
    with start_server(keep=work / "base") as up:
        yield up


@pytest.fixture(scope="module")
def head(python, tmp_path_factory):
    with ray_head(python, tmp_path_factory.mktemp("home"), clients=False) as head:
        yield head


@pytest.fixture(scope="module")
def expected(python, work, one_server) -> dict[str, bytes]:
    """The pairs of a run on one server."""
    with Program(python, [*asked(work, work / "one"), "--servers", one_server.url], work) as program:
        told = program.end()
        assert program.process.returncode == 0 and "8 of 8" in told, told
        assert program.nothing_is_left()
    found = pixels(work / "one")
    assert len(found) == 3 * SCENES
    return found


def made(out: Path) -> int:
    return len(list((out / "edited").glob("[!.]*.png")))


def is_complete(out: Path, expected: dict[str, bytes]) -> bool:
    files = [path.name for path in out.rglob("*") if path.is_file()]
    assert not [name for name in files if name.startswith(TEMPORARY) or name.endswith(".jsonl")]
    return pixels(out) == expected and sum(name.endswith(".txt") for name in files) == SCENES


def test_no_pair_is_lost_when_the_actors_are_killed_and_then_the_servers(python, work, command, expected):
    out = work / "killed"
    with Program(python, command(out), work) as program:
        program.wait_for(lambda: made(out) >= 2, "two pairs")
        orphans = program.servers()
        assert len(orphans) == 2
        for server in orphans:
            actor = server.parent()
            assert "ray" in actor.name().lower()
            actor.kill()
        before = made(out)
        program.wait_for(lambda: made(out) > before, "a pair of the new actors")
        assert made(out) < SCENES
        for server in program.servers():
            server.kill()
        told = program.end()
        assert program.process.returncode == 0, told
        assert is_complete(out, expected)
        assert not any(server.is_running() for server in orphans) and program.nothing_is_left()


def test_the_next_run_goes_on_when_the_driver_is_killed(python, work, command, expected):
    out = work / "driver"
    with Program(python, command(out), work) as program:
        program.wait_for(lambda: made(out) >= SCENES // 2, "half of the pairs")
        program.process.kill()
        assert program.nothing_is_left(but=RAYS_OWN)
    half = made(out)
    assert half < SCENES
    with Program(python, command(out), work) as program:
        told = program.end()
        assert program.process.returncode == 0, told
        assert f"8 of 8, {half} already there" in told
        assert is_complete(out, expected)
        assert program.nothing_is_left()


@presses_ctrl_c
def test_ctrl_c_ends_in_order(python, work, command, expected):
    out = work / "ctrl-c"
    with Program(python, command(out), work) as program:
        program.wait_for(lambda: program.servers(), "a server")
        os.killpg(program.process.pid, signal.SIGINT)  # as a terminal does: to all of them
        assert "Stopped. What is done is kept" in program.end()
        assert program.process.returncode == 130
        assert program.nothing_is_left()


def test_a_folder_with_broken_pictures_is_edited_but_for_those(python, work, one_server, head, tmp_path):
    """Stock nodes only; the server's words are told, and nothing of the pictures stays in its output."""
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "mine.png"}, "_meta": {"title": "source"}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "mine"}},
    }
    (tmp_path / "edit.json").write_text(json.dumps(graph))
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    whole = (work / "pictures" / "0.png").read_bytes()
    for name, content in (("whole.png", whole), ("cut.png", whole[:300]), ("words.jpg", b"no picture")):
        (folder / name).write_bytes(content)
    server = ["--servers", one_server.url, "--address", head.address]
    with Program(python, [*asked(tmp_path, out), *server], head.home) as program:
        told = program.end()
        assert program.process.returncode == 1 and "3 of 3, 2 failed (failed.jsonl)" in told, told
    noted = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    words = {Path(line["picture"]).name: line["words"] for line in noted}
    assert words["cut.png"] == ["its end is missing"]
    assert len(words["words.jpg"]) == 3 and "LoadImage (node 1): " in words["words.jpg"][0]
    (edited,) = (np.asarray(Image.open(path), dtype=int) for path in out.glob("whole-*.png"))
    source = np.asarray(Image.open(folder / "whole.png"), dtype=int)
    assert abs(edited - (255 - source)).max() <= 1  # the host rounds down
    assert not list((work / "base" / "output").glob("*.png"))


def test_a_node_that_a_real_server_does_not_know_is_told(python, work, one_server, head, tmp_path):
    graph = edit_workflow()
    graph["9"]["class_type"] = "NodeOfAnotherPack"
    (tmp_path / "edit.json").write_text(json.dumps(graph))
    command = [
        "pairs",
        "--workflow",
        tmp_path / "edit.json",
        "--pictures",
        work / "pictures",
        "--out",
        tmp_path / "out",
    ]
    with Program(python, [*command, "--servers", one_server.url, "--address", head.address], head.home) as program:
        assert "it does not know NodeOfAnotherPack. Install the packs" in program.end()
        assert program.process.returncode == 1
    assert not pixels(tmp_path / "out")
