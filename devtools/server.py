"""A real ComfyUI server with the pack, headless on a loopback port, and a client for its HTTP interface."""

import asyncio
import contextlib
import copy
import json
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .environment import Environment, link_folder, sees_gpu, unlink_folder
from .hosts import ROOT
from .process import DevError, stop

PACK_FOLDER = "pix2pix-zero"
START_PATIENCE = 240.0  # seconds
TEXT_EVENT, PREVIEW_EVENTS = 3, (1, 4)
ENDINGS = {"execution_success", "execution_error", "execution_interrupted"}


class GraphError(Exception):
    """A graph that the server refused, that failed or that was cancelled. `details`: the server's answer."""

    def __init__(self, message: str, details: dict | None = None) -> None:
        super().__init__(message)
        self.details = details or {}


@dataclass(frozen=True)
class Progress:
    """What a running graph reports: its node, a step count, a line of text, or that a preview picture came."""

    node: str | None
    value: int = 0
    maximum: int = 0
    text: str = ""
    preview: bytes = b""


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port_is_free(port: int) -> None:
    """Raises DevError when something already listens on the loopback port."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise DevError(f"Port {port} is in use. Stop what uses it, or choose another one with --port.")


@contextlib.contextmanager
def base_directory(keep: Path | None = None) -> Iterator[Path]:
    """A ComfyUI base directory whose custom_nodes holds this repository; temporary unless `keep` is given."""
    base = keep or Path(tempfile.mkdtemp(prefix="pix2pix-zero-"))
    link = base / "custom_nodes" / PACK_FOLDER
    try:
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        link_folder(link, ROOT)
        yield base
    finally:
        if not keep:
            unlink_folder(link)  # first, so that no removal can follow it into the repository
            shutil.rmtree(base, ignore_errors=True)


class Server:
    """A running server; use it in a `with` block.

    `environment`: the Python and the ComfyUI to run. `port`: a loopback port, None for any free one. `keep`: a base
    directory that stays, None for a temporary one. `options`: further ones of ComfyUI's main.py. `gpu`: whether to use a
    GPU, None for wherever torch sees one. `variables`: further environment variables. Its output goes to the file `log`.
    """

    foreground = False

    def __init__(
        self,
        environment: Environment,
        port: int | None = None,
        keep: Path | None = None,
        options: Sequence[str] = (),
        gpu: bool | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.environment = environment
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client_id = uuid.uuid4().hex
        self._keep, self._options, self._gpu = keep, tuple(options), gpu
        self._variables = dict(variables or {})
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen | None = None
        self.log = ROOT / ".comfyui" / "logs" / f"server-{self.port}.log"

    def __enter__(self) -> "Server":
        check_port_is_free(self.port)
        with contextlib.ExitStack() as cleanup:
            base = cleanup.enter_context(base_directory(self._keep))
            # the bytecode of its nodes: else that of every temporary directory would stay
            cleanup.callback(shutil.rmtree, self.environment.bytecode_of(base), ignore_errors=True)
            stream = None
            if not self.foreground:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                stream = cleanup.enter_context(self.log.open("wb"))
            self._process = subprocess.Popen(
                self._command(base),
                cwd=self.environment.comfyui.path,
                env=self.environment.variables(**self._variables),
                stdin=subprocess.PIPE,  # host_main.py ends when this pipe does
                stdout=stream,
                stderr=stream and subprocess.STDOUT,
                # a Ctrl-C in the terminal is ours alone: we end the server, once
                start_new_session=True,
            )
            cleanup.callback(stop, self._process)
            self._wait_until_ready()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._cleanup.close()

    def _command(self, base: Path) -> list[str]:
        comfyui = self.environment.comfyui
        command = [str(self.environment.python), str(ROOT / "cluster" / "host_main.py")]
        command += [str(comfyui.path / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(base), "--disable-auto-launch", "--preview-method", "auto"]
        command += ["--database-url", f"sqlite:///{(base / 'comfyui.db').as_posix()}"]
        if comfyui.own and (comfyui.path / "models").is_dir():
            command += ["--extra-model-paths-config", str(_model_paths(comfyui.path / "models", base))]
        if not (sees_gpu(self.environment) if self._gpu is None else self._gpu):
            command.append("--cpu")
        return [*command, *self._options]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_PATIENCE
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise DevError(f"ComfyUI ended while it started: {self._last_line()}")
            with contextlib.suppress(OSError):
                self.get("/queue", timeout=5)
                return
            time.sleep(0.2)
        raise DevError(f"ComfyUI did not answer within {START_PATIENCE:.0f} s: {self._last_line()}")

    def _last_line(self) -> str:
        if self.foreground:
            return "see its output above."
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return f"{lines[-1].strip() if lines else 'no output'} (log: {self.log})"

    def example_url(self, name: str) -> str:
        """The address that opens an example of the pack in the frontend."""
        return f"{self.url}/?{urllib.parse.urlencode({'template': name, 'source': PACK_FOLDER})}"

    @property
    def process_id(self) -> int:
        """Of the server."""
        return self._process.pid

    def another_client(self) -> "Server":
        """The same server as another client of it sees it. It ends with this one."""
        client = copy.copy(self)
        client.client_id = uuid.uuid4().hex
        return client

    def wait(self) -> int:
        """Wait until the server ends by itself; its exit status."""
        return self._process.wait()

    # --- the client -----------------------------------------------------------------------------------------------

    def get(self, path: str, timeout: float = 60.0) -> bytes:
        """The body that the server answers to GET."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:  # noqa: S310 (loopback)
            return answer.read()

    def post(self, path: str, content: object = None) -> dict:
        """POST a JSON value; the answer's JSON value, `{}` for an empty one.

        Raises GraphError: the server refused, with its reasons.
        """
        body = json.dumps({} if content is None else content).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                text = answer.read()
        except urllib.error.HTTPError as error:
            details = json.loads(error.read() or b"{}")
            raise GraphError(_reasons(details), details) from None
        return json.loads(text) if text else {}

    def object_info(self, node_id: str | None = None) -> dict:
        """The schema of every node, or of one."""
        return json.loads(self.get("/object_info" + (f"/{node_id}" if node_id else "")))

    def interrupt(self) -> None:
        """Cancel the running graph."""
        self.post("/interrupt")

    def free(self) -> None:
        """Unload all models and forget all cached results."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def run(
        self, graph: dict, on_progress: Callable[[Progress], None] | None = None, patience: float = 900.0
    ) -> dict[str, dict]:
        """Run an API graph to its end; the outputs by node id, as in ComfyUI's history.

        Raises GraphError: the graph was refused, failed, was cancelled, or took longer than `patience` seconds.
        """
        # In a thread of its own: the caller's may have a loop that runs, as that of a browser test has.
        with ThreadPoolExecutor(1) as thread:
            listening = thread.submit(asyncio.run, self._listen(graph, on_progress, patience))
            try:
                prompt_id, ending, data = listening.result()
            except BaseException:
                if not listening.done():  # we are ended, and would wait here for the graph
                    self.interrupt()
                raise
        return self._outputs(prompt_id, ending, data)

    async def _listen(
        self, graph: dict, on_progress: Callable[[Progress], None] | None, patience: float
    ) -> tuple[str, str, dict]:
        """Queue a graph and follow it to its end: its id, and the last message's kind and data."""
        import aiohttp  # only where graphs run: `dev.py serve` runs in a Python that need not have it

        address = f"{self.url}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as messages:
            prompt_id = self.post("/prompt", {"prompt": graph, "client_id": self.client_id})["prompt_id"]
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                try:
                    message = await messages.receive(timeout=1.0)
                except asyncio.TimeoutError:
                    if self._process.poll() is not None:
                        raise GraphError(f"ComfyUI ended: {self._last_line()}") from None
                    continue
                if message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    data = event.get("data") or {}
                    if data.get("prompt_id") == prompt_id and event["type"] in ENDINGS:
                        return prompt_id, event["type"], data
                    progress = _text_progress(event["type"], data)
                elif message.type == aiohttp.WSMsgType.BINARY:
                    progress = _binary_progress(message.data)
                else:
                    raise GraphError(f"the server closed the progress connection: {self._last_line()}")
                if on_progress and progress:
                    on_progress(progress)
        self.interrupt()
        raise GraphError(f"the graph did not end within {patience:.0f} s")

    def _outputs(self, prompt_id: str, ending: str, data: dict) -> dict[str, dict]:
        if ending == "execution_error":
            node = f"{data.get('node_type')} (node {data.get('node_id')})"
            raise GraphError(f"{node}: {str(data.get('exception_message', '')).strip()}", data)
        if ending == "execution_interrupted":
            raise GraphError("the graph was cancelled", data)
        deadline = time.monotonic() + 10  # the history is written just after the last message is sent
        while time.monotonic() < deadline:
            history = json.loads(self.get(f"/history/{prompt_id}"))
            if prompt_id in history:
                return history[prompt_id]["outputs"]
            time.sleep(0.05)
        raise GraphError("the server has no record of the graph it ran")

    def view(self, picture: dict) -> bytes:
        """The file behind one entry of a node's `images` output."""
        names = {name: picture[name] for name in ("filename", "subfolder", "type")}
        return self.get("/view?" + urllib.parse.urlencode(names))


class ForegroundServer(Server):
    """One that leaves its output on our terminal."""

    foreground = True


def _model_paths(models: Path, base: Path) -> Path:
    """A search path file that lets the server read, and never write, somebody's model folders."""
    folders = sorted(entry.name for entry in models.iterdir() if entry.is_dir())
    content = {"own": {"base_path": str(models), **{name: name for name in folders}}}
    path = base / "model_paths.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return path


def _reasons(details: dict) -> str:
    """What the server has against a graph, in one line."""
    reasons = [str(details.get("error", {}).get("message", "the server refused the request"))]
    for node_id, node in (details.get("node_errors") or {}).items():
        for error in node.get("errors", []):
            reasons.append(f"{node.get('class_type')} (node {node_id}): {error.get('message')}: {error.get('details')}")
    return "; ".join(reasons)


def _text_progress(kind: str, data: dict) -> Progress | None:
    if kind == "progress":
        return Progress(data.get("node"), int(data["value"]), int(data["max"]))
    if kind == "executing" and data.get("node"):
        return Progress(data["node"])
    return None


def _binary_progress(message: bytes) -> Progress | None:
    (kind,) = struct.unpack(">I", message[:4])
    if kind == TEXT_EVENT:
        (length,) = struct.unpack(">I", message[4:8])
        return Progress(message[8 : 8 + length].decode(), text=message[8 + length :].decode())
    if kind in PREVIEW_EVENTS:
        return Progress(None, preview=message[4:])
    return None
