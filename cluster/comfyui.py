"""A ComfyUI server: a client for its HTTP interface, and one that we start ourselves."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

import requests

from .workflow import Workflow

OLDEST = (0, 16, 3)  # ComfyUI, for the pack's nodes
START_PATIENCE = 240.0  # seconds
TIMEOUT = (10.0, 120.0)  # seconds to connect, and between two bytes of an answer
PACK = "Pix2PixZero"


class ServerLost(Exception):
    """The server does not answer any more."""


class ServerUnfit(Exception):
    """The server cannot run the workflow at all."""


class PictureFailed(Exception):
    """The server refused a picture, failed at it or took too long, in its own words."""


class Cancelled(Exception):
    """Somebody here asked for the end."""


class Client:
    """A server at an address. `patience`: seconds that one picture may take."""

    def __init__(self, url: str, patience: float) -> None:
        self.url = url.rstrip("/") + "/"
        self._patience = patience
        self._id = uuid.uuid4().hex
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy stands before a server of ours

    def answers(self) -> bool:
        """Whether the server is up."""
        try:
            self._ask("GET", "queue")
        except (ServerLost, PictureFailed):
            return False
        return True

    def check(self, workflow: Workflow) -> None:
        """Raises ServerUnfit if it cannot run the workflow, ServerLost if it is down."""
        try:
            version = self._ask("GET", "system_stats").json().get("system", {}).get("comfyui_version", "unknown")
            known = self._ask("GET", "object_info").json()
        except (PictureFailed, ValueError, AttributeError) as failure:
            raise ServerUnfit(f"it does not answer as ComfyUI does ({failure})") from failure
        ours = [name for name in workflow.classes if name.startswith(PACK)]
        if ours and _numbers(version) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise ServerUnfit(f"its ComfyUI is {version}, and {oldest} is needed. Update it")
        missing = [name for name in workflow.classes if name not in known]
        if ours and not any(name.startswith(PACK) for name in known):
            raise ServerUnfit("it does not have the Pix2Pix-Zero pack. Install it there, and restart")
        if missing:
            raise ServerUnfit(f"it does not know {', '.join(missing)}. Install the packs with these nodes, and restart")

    def edit(self, workflow: Workflow, picture: bytes, ending: str, stop: threading.Event) -> list[dict[str, bytes]]:
        """What a picture becomes; nothing if the workflow leaves it out. `picture`: a file, `ending`: of its name.

        Raises PictureFailed, ServerLost, Cancelled; ServerUnfit: it saved pairs, but does not say where.
        """
        name = f"cluster-{self._id}{ending}"
        fields = {"type": "temp", "overwrite": "true"}
        self._ask("POST", "upload/image", data=fields, files={"image": (name, picture)})
        prompt = {"prompt": workflow.prompt(f"{name} [temp]"), "client_id": self._id}
        prompt_id = self._ask("POST", "prompt", json=prompt).json()["prompt_id"]
        outputs = self._wait(prompt_id, stop).get(workflow.save, {})
        if not workflow.makes_pairs:
            results = [{"edited": self._view(image)} for image in outputs.get("images", ())]
            if not results:
                raise PictureFailed("the workflow ended without a picture")
        elif "pairs" in outputs:
            results = [self._pair(place) for place in outputs["pairs"]]
        else:
            raise ServerUnfit("its Pix2Pix-Zero pack is older than this one. Update it, and restart")
        self._ask("POST", "history", json={"delete": [prompt_id]})
        return results

    def _wait(self, prompt_id: str, stop: threading.Event) -> dict:
        """The outputs of a workflow, by node."""
        begin, pause = time.monotonic(), 0.05
        while True:
            entry = self._ask("GET", f"history/{prompt_id}").json().get(prompt_id)
            if entry:
                if entry.get("status", {}).get("status_str") == "error":
                    raise PictureFailed(_error(entry["status"].get("messages", ())))
                return entry["outputs"]
            late = time.monotonic() - begin > self._patience
            if late or stop.is_set():
                self._cancel(prompt_id)
                raise PictureFailed(f"it took more than {self._patience:.0f} s") if late else Cancelled
            if pause > 0.9 and not self._is_queued(prompt_id):
                if prompt_id not in self._ask("GET", f"history/{prompt_id}").json():
                    raise ServerLost("it was restarted and forgot the picture")
            stop.wait(pause)
            pause = min(1.0, pause * 1.2)

    def _is_queued(self, prompt_id: str) -> bool:
        queue = self._ask("GET", "queue").json()
        return any(item[1] == prompt_id for name in ("queue_running", "queue_pending") for item in queue[name])

    def _cancel(self, prompt_id: str) -> None:
        self._ask("POST", "queue", json={"delete": [prompt_id]})
        if self._is_queued(prompt_id):  # it runs
            self._ask("POST", "interrupt", json={"prompt_id": prompt_id})

    def _pair(self, place: Mapping) -> dict[str, bytes]:
        folder = place["subfolder"].removesuffix("edited")
        kinds = ["source", "edited", "mask"] if place["mask"] else ["source", "edited"]
        pair = {kind: self._view({**place, "subfolder": folder + kind}) for kind in kinds}
        if place["caption"]:
            pair["caption"] = (place["caption"] + "\n").encode()
        return pair

    def _view(self, file: Mapping) -> bytes:
        return self._ask("GET", "view", params={name: file[name] for name in ("filename", "subfolder", "type")}).content

    def _ask(self, method: str, path: str, **content) -> requests.Response:
        try:
            answer = self._session.request(method, urljoin(self.url, path), timeout=TIMEOUT, **content)
        except requests.RequestException as failure:
            raise ServerLost(f"it does not answer ({_root(failure)})") from failure
        if not answer.ok:
            raise PictureFailed(_refusal(answer))
        return answer


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:3])


def _root(failure: BaseException) -> str:
    """The innermost reason, without the objects that it is wrapped in."""
    reason = getattr(failure.args[0], "reason", None) if failure.args else None
    words = str(reason or failure)
    return re.sub(r"^\[Errno \d+\] ", "", words.rpartition(": ")[2]) or type(failure).__name__


def _refusal(answer: requests.Response) -> str:
    """What the server has against a request, in one line."""
    try:
        details = answer.json()
        reasons = [str(details["error"]["message"])]
        for node_id, node in (details.get("node_errors") or {}).items():
            for error in node.get("errors", ()):
                reasons.append(
                    f"{node.get('class_type')} (node {node_id}): {error.get('message')}: {error.get('details')}"
                )
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{answer.status_code} {answer.reason}"
    return "; ".join(reasons)


def _error(messages) -> str:
    """What made a workflow fail, in one line."""
    for kind, data in messages:
        if kind == "execution_error":
            words = str(data.get("exception_message", "")).strip()
            return f"{data.get('node_type')} (node {data.get('node_id')}): {words}"
        if kind == "execution_interrupted":
            return "it was cancelled on the server"
    return "it failed without a reason"


@dataclass(frozen=True)
class Start:
    """How a server of our own is started. `variables`: for its environment, None takes one out."""

    comfyui: str
    python: str = ""
    options: tuple[str, ...] = ()
    variables: tuple[tuple[str, str | None], ...] = ()
    program: str = (Path(__file__).with_name("host_main.py")).read_text(encoding="utf-8")


class OwnServer:
    """A server on a free loopback port, that ends with this process. Its results go to a folder that goes with it."""

    def __init__(self, start: Start) -> None:
        main = Path(start.comfyui).expanduser() / "main.py"
        if not main.is_file():
            raise ServerUnfit(f"there is no ComfyUI in {start.comfyui}")
        self.folder = Path(tempfile.mkdtemp(prefix="pix2pix-zero-cluster-"))
        self.log = self.folder / "comfyui.log"
        (self.folder / "user").mkdir()
        self.url = f"http://127.0.0.1:{_free_port()}"
        command = [_python(start), "-c", start.program, str(main), "--listen", "127.0.0.1"]
        command += ["--port", self.url.rpartition(":")[2], "--disable-auto-launch"]
        command += ["--output-directory", str(self.folder / "output"), "--temp-directory", str(self.folder)]
        command += ["--user-directory", str(self.folder / "user")]
        command += ["--database-url", f"sqlite:///{(self.folder / 'comfyui.db').as_posix()}", *start.options]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=main.parent,
                env=_environment(start),
                stdin=subprocess.PIPE,  # the program ends when this pipe does
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def runs(self) -> bool:
        """Whether its process is there."""
        return self._process.poll() is None

    def wait_until_ready(self, client: Client, stop: threading.Event) -> None:
        """Raises ServerUnfit if it ends instead, Cancelled if that is asked for."""
        deadline = time.monotonic() + START_PATIENCE
        while not client.answers():
            if not self.runs:
                raise ServerUnfit(f"ComfyUI ended while it started: {self._last_line()}")
            if time.monotonic() > deadline:
                raise ServerUnfit(f"ComfyUI did not answer within {START_PATIENCE:.0f} s: {self._last_line()}")
            if stop.wait(0.2):
                raise Cancelled

    def tidy(self) -> None:
        """Delete the results so far."""
        for name in ("output", "temp"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def stop(self) -> None:
        """End it and delete its folder."""
        if self.runs:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _last_line(self) -> str:
        lines = [line.strip() for line in self.log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


def _python(start: Start) -> str:
    """The Python that runs ComfyUI."""
    if start.python:
        return str(Path(start.python).expanduser())
    home = Path(start.comfyui).expanduser()
    names = (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "venv/Scripts/python.exe")
    for python in (*(home / name for name in names), home.parent / "python_embeded" / "python.exe"):
        if python.is_file():
            return str(python)
    raise ServerUnfit(f"no Python was found in {home}. Name the one that runs ComfyUI with --python")


def _environment(start: Start) -> dict[str, str]:
    dropped = {"PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", *(name for name, value in start.variables if value is None)}
    kept = {name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("RAY_")}
    return {**kept, **{name: value for name, value in start.variables if value is not None}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
