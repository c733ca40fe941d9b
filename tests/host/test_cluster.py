"""Eight scenes on two real servers while what runs is killed: nothing is lost, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from cluster_runs import Program, cluster_python, edit_workflow, pixels, write_scenes
from pix2pix_zero.devtools import server as servers
from pix2pix_zero.devtools.environment import running
from pix2pix_zero.devtools.process import one_thread

SCENES = 8
# They report the death of their parent to a Ray that is dead too, and end a minute later.
RAYS_OWN = ("ray::Dash", "ray::Runt")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and process groups of POSIX")


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
def command(work):
    """`command(out)`: the arguments of a run on two servers of its own."""

    def arguments(out: Path) -> list[object]:
        here = running()
        theirs = ["--base-directory", work / "base", "--cpu", "--disable-api-nodes"]
        spawn = ["--spawn", 2, "--comfyui", here.comfyui.path, "--python", here.python]
        return [*asked(work, out), *spawn, "--", *theirs]

    return arguments


def asked(work: Path, out: Path) -> list[object]:
    return ["pairs", "--workflow", work / "edit.json", "--pictures", work / "pictures", "--out", out]


@pytest.fixture(scope="module")
def expected(python, work) -> dict[str, bytes]:
    """The pairs of a run on one server, which somebody else has started."""
    with (
        servers.Server(
            running(), keep=work / "base", options=["--disable-api-nodes"], gpu=False, variables=one_thread()
        ) as up,
        Program(python, [*asked(work, work / "one"), "--servers", up.url], work) as program,
    ):
        assert "8 of 8" in program.end()
        assert program.process.returncode == 0
        assert program.nothing_is_left()
    found = pixels(work / "one")
    assert len(found) == 3 * SCENES
    return found


def made(out: Path) -> int:
    return len(list((out / "edited").glob("[!.]*.png")))


def is_complete(out: Path, expected: dict[str, bytes]) -> bool:
    files = [path.name for path in out.rglob("*") if path.is_file()]
    assert not [name for name in files if name.endswith((".part", ".jsonl"))]
    return pixels(out) == expected and sum(name.endswith(".txt") for name in files) == SCENES


def test_no_pair_is_lost_when_an_actor_is_killed(python, work, command, expected):
    out = work / "actor"
    with Program(python, command(out), work) as program:
        program.wait_for(lambda: made(out) >= 2, "two pairs")
        server = program.servers()[0]
        actor = server.parent()
        assert "ray" in actor.name().lower()
        actor.kill()
        told = program.end()
        assert program.process.returncode == 0, told
        assert is_complete(out, expected)
        assert not server.is_running() and program.nothing_is_left()


def test_no_pair_is_lost_when_a_server_is_killed(python, work, command, expected):
    out = work / "server"
    with Program(python, command(out), work) as program:
        program.wait_for(lambda: made(out) >= 2, "two pairs")
        for server in program.servers():
            server.kill()
        told = program.end()
        assert program.process.returncode == 0, told
        assert is_complete(out, expected)
        assert program.nothing_is_left()


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


def test_ctrl_c_ends_in_order(python, work, command, expected):
    out = work / "ctrl-c"
    with Program(python, command(out), work) as program:
        program.wait_for(lambda: program.servers(), "a server")
        os.killpg(program.process.pid, signal.SIGINT)  # as a terminal does: to all of them
        assert "Stopped. What is done is kept" in program.end()
        assert program.process.returncode == 130
        assert program.nothing_is_left()
