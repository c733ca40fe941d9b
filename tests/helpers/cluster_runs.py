"""What the tests of `cluster` share: pictures, workflows, the program as a process, and the processes below it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from pix2pix_zero.demo_model.scene import sample_scene
from pix2pix_zero.demo_model.scene_renders import render
from pix2pix_zero.devtools.environment import CLUSTER_LOG, prepare_cluster, running
from pix2pix_zero.devtools.graphs import EXAMPLE
from pix2pix_zero.devtools.hosts import ROOT
from pix2pix_zero.devtools.process import DevError, clean_environment, one_thread, stop
from pix2pix_zero.devtools.server import free_port

presses_ctrl_c = pytest.mark.skipif(os.name == "nt", reason="process groups and their signals are of POSIX")
PATIENCE = 300.0
LOOK = 0.25  # a look at all processes of a machine costs it some hundredths of a second
SILENT_HEAD = Path(__file__).with_name("silent_head.py")
LIMITED = Path(__file__).with_name("limited_cluster.py")
TRACED = {"PYTHONFAULTHANDLER": "1"}  # SIGABRT makes it write where its threads are
BELOW = ("7", "2", "9", "10", "12", "13", "15", "16")  # the steps of the first example's edit


def cluster_python() -> Path:
    """The Python that has Ray; skips the test where Ray has no package for this Python or system."""
    try:
        return prepare_cluster(running())
    except DevError:
        told = " ".join(CLUSTER_LOG.read_text(encoding="utf-8", errors="replace").split())
        if "no wheels with a matching" not in told:
            raise
        pytest.skip("Ray has no package for this Python or system")


def write_scenes(folder: Path, count: int) -> Path:
    """Pictures of cats."""
    folder.mkdir()
    for seed in range(count):
        Image.fromarray(render(sample_scene(seed, subject="cat"))).save(folder / f"{seed}.png")
    return folder


def edit_workflow(steps: int = 2) -> dict:
    """Cat to dog with the demo model, from *Load Image* to *Save Edit Pair*, in API form.

    Every server encodes the direction's sentences anew, so there are few of them.
    """
    example = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    graph = {key: example[key] for key in BELOW}
    graph["3"] = {"class_type": "LoadImage", "inputs": {"image": "mine.png"}, "_meta": {"title": "source"}}
    graph["7"]["inputs"]["text"] = "a photo of a cat"
    graph["10"]["inputs"]["steps"] = steps
    sentences = {"source_sentences": "a photo of a cat", "target_sentences": "a photo of a dog"}
    graph["12"] = {
        "class_type": "Pix2PixZeroEditDirectionFromSentences",
        "inputs": {"clip": ["2", 1], "alignment": "positions", **sentences},
    }
    inputs = {"source": ["3", 0], "edited": ["16", 0], "edited_area": ["15", 1], "caption": "a dog", "dataset": "mine"}
    graph["20"] = {"class_type": "Pix2PixZeroSavePair", "inputs": inputs}
    return graph


@dataclass(frozen=True)
class Head:
    """A Ray that runs beside the tests.

    `address`, `remote`: where programs on its machine and on others find it. `home`: its, and theirs. `logs`: a folder above.
    """

    address: str
    remote: str
    home: Path
    logs: Path


@contextlib.contextmanager
def ray_head(python: Path, home: Path, clients: bool = True) -> Iterator[Head]:
    """A `Head` in a home like this. `clients`: whether it answers at `remote`, which takes a process for each of them."""
    # its sockets' paths must be short
    temporary = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
    own = {"HOME": str(home), "RAY_TMPDIR": temporary.name, "RAY_USAGE_STATS_ENABLED": "0"}
    # Beside other tests, a client's server takes its time; and gRPC waits longer and longer between two looks for it.
    own |= {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "300", "TIMEOUT_FOR_SPECIFIC_SERVER_S": "120"}
    own["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # else one of ten to a hundred such servers dies while it is forked
    port, client = free_port(), free_port()
    command = [python.with_name("ray"), "start", "--head", "--block", "--port", port]
    command += ["--ray-client-server-port", client] if clients else []
    command += ["--node-ip-address", "127.0.0.1", "--num-cpus", 1, "--object-store-memory", 100_000_000]
    # what no test looks at: each is a process that takes seconds
    command += ["--include-dashboard", "false", "--include-log-monitor", "false", "--no-monitor"]
    head = subprocess.Popen(
        [str(part) for part in command],
        env=clean_environment(**own),
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    try:
        for each in (port, client) if clients else (port,):
            deadline = time.monotonic() + 120
            while socket.socket().connect_ex(("127.0.0.1", each)):
                assert time.monotonic() < deadline and head.poll() is None
                time.sleep(0.2)
        yield Head(f"127.0.0.1:{port}", f"ray://127.0.0.1:{client}", home, Path(temporary.name))
    finally:
        stop(head, 30)
        temporary.cleanup()


@contextlib.contextmanager
def silent_head(python: Path, folder: Path, *ends: str) -> Iterator[tuple[subprocess.Popen, dict[str, int]]]:
    """What answers at ray:// until these, see `silent_head.py`, and the port of each. Its marks are made in this folder."""
    command = [str(python), str(SILENT_HEAD), str(folder), *ends]
    head = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True)
    try:
        yield head, {until: int(head.stdout.readline()) for until in ends}
    finally:
        stop(head)
        head.stdout.close()


class Program:
    """`python cluster` as a process, with a home and a folder for Ray of its own.

    `limits`: seconds in the place of the program's own, by module and name, as `run.LEAVING`.
    """

    def __init__(
        self, python: Path, arguments: list[object], home: Path, limits: dict | None = None, **variables: str
    ) -> None:
        # Ray's sockets lie below this folder, and their paths may have 107 letters
        self._temporary = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        own = {"HOME": str(home), "RAY_TMPDIR": self._temporary.name}
        # without its bytecode each of Ray's processes would compile Ray first
        bytecode = {"PYTHONPYCACHEPREFIX": str(running().folder / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
        program = [str(LIMITED), json.dumps(limits)] if limits else []
        self._told = Path(self._temporary.name, "told.txt")
        with self._told.open("wb") as told:
            self.process = subprocess.Popen(
                [str(python), *program, str(ROOT / "cluster"), *map(str, arguments)],
                env=clean_environment(**own, **bytecode, **one_thread(), **TRACED, **variables),
                stdout=told,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_) -> None:
        self.processes()
        self.process.kill()
        self.process.wait()
        for process in self.left():
            process.kill()
        self._temporary.cleanup()

    def processes(self) -> list[psutil.Process]:
        """All below the program that run now."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self._seen |= {process.pid: process for process in found}
        return found

    def servers(self) -> list[psutil.Process]:
        """The ComfyUI that it has started."""
        return [process for process in self.processes() if "--output-directory" in _command(process)]

    def left(self, but: tuple[str, ...] = ()) -> list[psutil.Process]:
        """Those that were seen below the program and still run, but for those whose names begin so."""
        return [
            process for process in self._seen.values() if _runs(process) and not process.name().startswith(but or "\0")
        ]

    def wait_for(self, happened: Callable[[], object], what: str) -> object:
        """What `happened` returns, once that is something."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := happened():
                self.processes()
                return found
            time.sleep(0.05)
        self._fail(f"{what}: it did not come to that")

    def end(self) -> str:
        """All it wrote, once it has ended."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                self._fail(f"it does not end within {PATIENCE:g} s")
            self.processes()
            time.sleep(LOOK)
        return self.told()

    def told(self) -> str:
        """All it has written by now."""
        return self._told.read_text(encoding="utf-8", errors="replace")

    def _fail(self, why: str) -> None:
        """With what it wrote and, if it still runs, where each of its threads is."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        pytest.fail(f"{why}. It wrote:\n{self.told()}")

    def nothing_is_left(self, but: tuple[str, ...] = ()) -> bool:
        """Whether all its processes end within some seconds after it, but for those whose names begin so."""
        deadline = time.monotonic() + 20
        while self.left(but) and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.left(but)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def pixels(folder: Path) -> dict[str, bytes]:
    """The pixels of every picture in a folder and below, by path."""
    return {
        path.relative_to(folder).as_posix(): np.asarray(Image.open(path)).tobytes()
        for path in sorted(folder.rglob("*.png"))
    }
