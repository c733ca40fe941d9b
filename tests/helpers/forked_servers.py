"""Real ComfyUI servers that start in a few seconds: each is forked from a process that has imported what takes long.

Run as a program, it is that process. Nothing of ComfyUI is imported before the fork, so that a server reads its own flags.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

# Of the host's imports those that take longest and know nothing of its flags.
HEAVY = (
    "torch",
    "torch._dynamo",
    "torchvision.transforms",
    "torchsde",
    "transformers",
    "kornia",
    "sqlalchemy.orm",
    "alembic.command",
    "aiohttp.web",
    "comfy_kitchen",
    "scipy.stats",
    "spandrel",
    "av",
    "pydantic",
)


class Nursery:
    """The process that servers are forked from; use it in a `with` block. `environment`: of `devtools`."""

    def __init__(self, environment, variables: dict[str, str]):
        command = [str(environment.python), __file__]
        self._process = subprocess.Popen(
            command,
            cwd=environment.comfyui.path,
            env=environment.variables(**variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()

    def ask(self, **request) -> int | None:
        """The answer to a request of `_serve`."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Forked:
    """As `subprocess.Popen`, of a fork. `command`: of `devtools.server.Server`, whose output goes to `log`."""

    def __init__(self, nursery: Nursery, command: list[str], log: Path):
        self._nursery = nursery
        main = next(part for part in command if part.endswith("main.py") and "host_main" not in part)
        self.pid = nursery.ask(start=command[command.index(main) :], log=str(log))

    def poll(self) -> int | None:
        return self._nursery.ask(poll=self.pid)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    terminate = kill  # what it would tidy up is in a temporary folder

    def wait(self, timeout: float | None = None) -> int:
        return self._nursery.ask(wait=self.pid)


def _serve() -> None:
    children = {}
    try:
        for line in sys.stdin:
            request = json.loads(line)
            if "start" in request:
                pid = os.fork()
                if not pid:
                    _become(request["start"], request["log"])
                children[pid] = answer = pid
            else:
                answer = _ended(children, request.get("poll") or request["wait"], block="wait" in request)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def _ended(children: dict, pid: int, block: bool) -> int | None:
    """The exit status of a child, or None while it runs."""
    if pid not in children:
        return 0
    found, status = os.waitpid(pid, 0 if block else os.WNOHANG)
    if not found:
        return None
    del children[pid]
    return os.waitstatus_to_exitcode(status)


def _become(command: list[str], log: str) -> None:
    nothing, stream = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((nothing, 0), (stream, 1), (stream, 2)):
        os.dup2(source, target)
    sys.argv[:] = command
    sys.path[0] = os.path.dirname(command[0])
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        os._exit(1)


if __name__ == "__main__":
    for name in HEAVY:
        if find_spec(name.partition(".")[0]) is not None:
            import_module(name)
    _serve()
