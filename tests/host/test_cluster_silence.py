"""Ray clusters that answer up to a point and then never again: the program ends in words, and Ctrl-C is heard."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_runs import Program, cluster_python, presses_ctrl_c, silent_head
from cluster_workflows import EDIT

TAKEN_IN = {"connection.ATTEMPTS": [250], "run.ACTORS": 250, "run.LEAVING": 1}


@pytest.fixture(scope="module")
def python() -> Path:
    return cluster_python()


@pytest.fixture(scope="module")
def heads(python, tmp_path_factory) -> Iterator[dict[str, tuple[int, Path]]]:
    """The ports of heads that are silent after something, and their marks."""
    folder = tmp_path_factory.mktemp("silent")
    with silent_head(python, folder, "ping", "init", "log", "resources", "work") as (_, ports):
        yield {until: (port, folder / until) for until, port in ports.items()}


@dataclass
class Silence:
    """The program, and whether its head is silent yet."""

    program: Program
    mark: Path

    def wait(self) -> None:
        self.program.wait_for(self.mark.exists, "silence")


@pytest.fixture
def started(python, heads, tmp_path):
    """`started(until, limits)`: the program with a head that is silent after `until`. `head`: another one, as in `heads`."""

    @contextlib.contextmanager
    def start(until: str, limits: dict, head: tuple[int, Path] | None = None, **variables: str) -> Iterator[Silence]:
        port, mark = head or heads[until]
        mark.unlink(missing_ok=True)
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "0.png").write_bytes(b"picture 0")
        (tmp_path / "w.json").write_text(json.dumps(EDIT))
        files = ["--workflow", tmp_path / "w.json", "--pictures", tmp_path / "pictures", "--out", tmp_path / "out"]
        arguments = ["pairs", *files, "--servers", "http://127.0.0.1:9", "--address", f"ray://127.0.0.1:{port}"]
        with Program(python, arguments, tmp_path, limits, **variables) as program:
            yield Silence(program, mark)

    return start


@pytest.mark.parametrize(
    ("until", "limits", "words"),
    [
        (
            "ping",
            {"connection.ATTEMPTS": [1, 1], "connection.CLOSING": 1},
            "does not take us in: no answer within 1 s. ",
        ),
        ("init", {"connection.ATTEMPTS": [1, 1]}, "does not take us in: no answer within 1 s. "),
        ("log", {"connection.ATTEMPTS": [5]}, "does not take us in: RuntimeError: Starting Ray client server failed. "),
        ("resources", TAKEN_IN | {"run.ACTORS": 1}, "answers no more: no answer within 1 s. "),
    ],
)
def test_a_cluster_that_stops_answering_is_told_in_words(started, until, limits, words):
    with started(until, limits) as silence:
        told = silence.program.end()
    assert silence.program.process.returncode == 1
    assert words in told and "--address HEAD:6379" in told and "Traceback" not in told
    assert ("Not connected (no answer within 1 s). Trying again (1 of 1) ..." in told) == (until == "init")


def test_a_cluster_that_is_lost_is_told_in_words(started, python, tmp_path):
    with silent_head(python, tmp_path, "work") as (head, ports):
        own = (ports["work"], tmp_path / "work")
        with started("work", TAKEN_IN, own, RAY_CLIENT_RECONNECT_GRACE_PERIOD="1") as silence:
            silence.wait()
            head.kill()
            told = silence.program.end()
    assert silence.program.process.returncode == 1
    assert "answers no more: " in told and "Traceback" not in told


@presses_ctrl_c
@pytest.mark.parametrize(("until", "limits"), [("init", {"connection.ATTEMPTS": [250]}), ("work", TAKEN_IN)])
def test_ctrl_c_ends_a_run_whose_cluster_is_silent(started, until, limits):
    with started(until, limits) as silence:
        silence.wait()
        os.killpg(silence.program.process.pid, signal.SIGINT)
        assert "Stopped. What is done is kept" in silence.program.end()
        assert silence.program.process.returncode == 130
