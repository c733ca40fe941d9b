"""Servers and pictures with faults: clear words, nothing half-written, and the next run goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_runs import Head, Program, cluster_python, presses_ctrl_c, ray_head, silent_head
from pix2pix_zero.devtools.server import free_port
from relay import Relay
from stand_in import KNOWN, StandIn, pair_of

COUNT = 4
GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "source"}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
}
EDIT = {**GRAPH, "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}}}
PAIRS = {**GRAPH, "3": {"class_type": "Pix2PixZeroSavePair", "inputs": {"source": ["1", 0], "edited": ["2", 0]}}}


@pytest.fixture(scope="module")
def python() -> Path:
    return cluster_python()


@pytest.fixture(scope="module")
def head(python, tmp_path_factory) -> Iterator[Head]:
    with ray_head(python, tmp_path_factory.mktemp("home")) as head:
        yield head


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(f"picture {number}".encode())
    return folder


@pytest.fixture
def started(python, head, pictures, tmp_path):
    """`started(workflow, *servers)`: the program, which sends the pictures to these servers and writes to `out`."""

    def start(
        workflow: dict,
        *servers: StandIn | str,
        address: str = head.address,
        options: tuple = (),
        limits: dict | None = None,
    ) -> Program:
        (tmp_path / "w.json").write_text(json.dumps(workflow))
        files = ["--workflow", tmp_path / "w.json", "--pictures", pictures, "--out", tmp_path / "out"]
        urls = ",".join(server if isinstance(server, str) else server.url for server in servers)
        which = ["--servers", urls, "--away", 1] if urls else []
        return Program(python, ["pairs", *files, *which, "--address", address, *options], head.home, limits)

    yield start
    for log in sorted(
        head.logs.glob("ray/session_2*/logs/ray_client_server*.err")
    ):  # pytest shows them if the test failed
        sys.stdout.write(f"{log.name}:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}\n")


@pytest.fixture
def ran(started):
    """The same, run to its end: (status, what it wrote)."""

    def run(*arguments, **more) -> tuple[int, str]:
        with started(*arguments, **more) as program:
            told = program.end()
            assert program.nothing_is_left()
            return program.process.returncode, told

    return run


def edits(tmp_path: Path) -> list[str]:
    return sorted(path.read_text() for path in (tmp_path / "out").glob("[!.]*.png"))


def all_but(*left_out: int) -> list[str]:
    return [f" of picture {number}" for number in range(COUNT) if number not in left_out]


def test_a_picture_that_fails_three_times_is_listed_and_the_next_run_makes_it(ran, tmp_path):
    def broken(content: bytes) -> dict | str:
        return "it is on fire" if content == b"picture 2" else StandIn.outputs(content)

    with StandIn(broken) as server:
        status, told = ran(EDIT, server)
        assert status == 1 and f"{COUNT} of {COUNT}, 1 failed" in told
        assert server.pictures.count(b"picture 2") == 3 and len(server.pictures) == COUNT + 2
        url = server.url
    assert edits(tmp_path) == all_but(2)
    (line,) = (tmp_path / "out" / "failed.jsonl").read_text().splitlines()
    noted = json.loads(line)
    assert Path(noted["picture"]).name == "2.png"
    assert noted["words"] == [f"{url}: ImageInvert (node 2): it is on fire"] * 3
    with StandIn() as server:
        status, told = ran(EDIT, server)
        assert status == 0 and f"{COUNT} of {COUNT}, {COUNT - 1} already there" in told
        assert server.pictures == [b"picture 2"]
    assert edits(tmp_path) == all_but()
    assert not (tmp_path / "out" / "failed.jsonl").exists()


def test_servers_that_cannot_run_the_workflow_are_left_out_in_words(ran, tmp_path):
    down = f"http://127.0.0.1:{free_port()}"
    stock = tuple(name for name in KNOWN if not name.startswith("Pix2PixZero"))
    with (
        StandIn(version="0.15.1") as old,
        StandIn(nodes=stock) as bare,
        StandIn(nodes=(*stock[1:], "Pix2PixZeroSavePair")) as lacking,
        StandIn(outputs=lambda content: {"text": ["1 pairs"]}) as older_pack,
    ):
        status, told = ran(PAIRS, down, old, bare, lacking, older_pack)
        assert status == 1
        for url, words in (
            (down, "it does not answer (Connection refused)"),
            (old.url, "its ComfyUI is 0.15.1, and 0.16.3 is needed"),
            (bare.url, "it does not have the Pix2Pix-Zero pack"),
            (lacking.url, "it does not know LoadImage"),
            (older_pack.url, "its Pix2Pix-Zero pack is older than this one"),
        ):
            (line,) = [line for line in told.splitlines() if line.startswith(f"cluster: {url} is left out")]
            assert words in line
        assert f"no server is left for the last {COUNT} pictures" in told and "Traceback" not in told
    with StandIn(lambda content: {"pairs": [pair_of(content)]}) as server:
        assert ran(PAIRS, server, down)[0] == 0, "one that is down does not keep the other from it"
    for kind in ("source", "edited", "mask"):
        texts = sorted(path.read_text() for path in (tmp_path / "out" / kind).glob("*.png"))
        assert texts == [f"{kind}{text}" for text in all_but()]


def test_a_server_that_fails_at_everything_does_not_use_up_the_pictures(ran, tmp_path):
    with StandIn(lambda content: "no such model") as bad, StandIn() as good:
        status, told = ran(EDIT, bad, good)
        assert status == 0, told
        assert 1 <= len(bad.pictures) == len(set(bad.pictures)), "it does not get a picture again"
        assert len(bad.pictures) < 3 or f"{bad.url} is left out: it failed at 3 pictures that another" in told
    assert edits(tmp_path) == all_but()


def test_what_the_workflow_leaves_out_is_not_made_again(ran, head, tmp_path):
    def kept(content: bytes) -> dict:
        return {"pairs": [] if content == b"picture 1" else [pair_of(content)]}

    with StandIn(kept) as server:
        status, told = ran(PAIRS, server, address=head.remote)  # as from another machine
        assert status == 0 and "1 left out (left_out.jsonl)" in told, told
        status, told = ran(PAIRS, server)
        assert status == 0, told
        assert len(server.pictures) == COUNT
    assert len(list((tmp_path / "out" / "edited").glob("*.png"))) == COUNT - 1


def test_a_head_that_does_not_answer_is_asked_again(ran, head, python, tmp_path):
    limits = {"connection.ATTEMPTS": [2, 280]}
    with StandIn() as server, silent_head(python, tmp_path, "init") as (_, silent):
        real = int(head.remote.rpartition(":")[2])
        # the first connection only looks whether anything listens
        with Relay(silent["init"], silent["init"], real) as relay:
            status, told = ran(EDIT, server, address=f"ray://127.0.0.1:{relay.port}", limits=limits)
    assert "Not connected (no answer within 2 s). Trying again (1 of 1) ..." in told and status == 0, told
    assert edits(tmp_path) == all_but()


@presses_ctrl_c
def test_ctrl_c_cancels_what_a_server_of_somebody_else_is_at(started):
    with StandIn(lambda content: None) as server, started(EDIT, server) as program:
        program.wait_for(lambda: server.pictures, "a picture")
        os.killpg(program.process.pid, signal.SIGINT)
        assert "Stopped." in program.end() and program.process.returncode == 130
        assert server.log[-1] == "POST interrupt"


def test_a_comfyui_that_does_not_start_is_told_with_its_last_words(ran, tmp_path, python):
    spawn = ("--spawn", 2, "--gpus-each", 0, "--comfyui")
    status, told = ran(EDIT, options=(*spawn, tmp_path))
    assert status == 1 and f"server 1 is left out: there is no ComfyUI in {tmp_path}" in told
    (tmp_path / "main.py").write_text("raise SystemExit('the disk is on fire')")
    status, told = ran(EDIT, options=(*spawn, tmp_path, "--python", python))
    assert status == 1 and "server 2 is left out: ComfyUI ended while it started: the disk is on fire." in told


def test_a_cluster_that_is_not_there_is_told_in_one_line(ran):
    with StandIn() as server:
        status, told = ran(EDIT, server, address=f"127.0.0.1:{free_port()}")
    assert status == 1 and "cluster: --address: no Ray answers at 127.0.0.1" in told and "Traceback" not in told
