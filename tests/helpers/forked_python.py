"""A Python that imports what takes ComfyUI long only once, at its first call: each call of it is a fork.

Run as a program, this is the process that is forked. Nothing of ComfyUI is imported before the fork, so that a server reads
its own flags. `ask_for_fork.py` is what a call runs.
"""

import contextlib
import ctypes
import functools
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from importlib import _bootstrap_external, import_module
from importlib.util import find_spec
from pathlib import Path

# Of the host's imports those that take longest and know nothing of its flags.
HEAVY = (
    "torch",
    "torch._dynamo",
    "torchvision.transforms",
    "torchsde",
    "transformers.models.clip.tokenization_clip",
    "kornia",
    "torchaudio",
    "sqlalchemy.orm",
    "sqlalchemy.dialects.sqlite.aiosqlite",
    "alembic.command",
    "aiohttp.web",
    "requests",
    "psutil",
    "comfy_kitchen",
    "scipy.signal",
    "scipy.stats",
    "spandrel",
    "av",
    "pydantic_settings",
)
M_ARENA_MAX = -8  # of glibc's mallopt
ASK = Path(__file__).with_name("ask_for_fork.py")


@contextlib.contextmanager
def forking(environment, variables: dict[str, str]) -> Iterator:
    """While active, an `Environment` like this one whose `python` is forked; the same one where forks are not safe.

    `variables`: those that libraries read when they are imported.
    """
    if sys.platform != "linux":
        yield environment
        return
    with (
        tempfile.TemporaryDirectory(prefix="fork-") as folder,  # a socket's path may have 107 letters
        tempfile.TemporaryDirectory(prefix="fork-", dir=environment.folder) as programs,  # elsewhere it may not be run
    ):
        door, python = Path(folder, "door"), Path(programs, "python")
        python.write_text(f'#!/bin/sh\nexec {shlex.join([str(environment.python), "-IS", str(ASK), str(door)])} "$@"\n')
        python.chmod(0o700)
        command = [environment.python, __file__, door]
        own = environment.variables(**variables, PYTHONPATH="")  # each call has its own
        process = subprocess.Popen(command, cwd=folder, env=own, stdin=subprocess.PIPE, start_new_session=True)
        try:
            while not door.exists():
                if process.poll() is not None:
                    raise RuntimeError("the process that servers are forked from has ended")
                threading.Event().wait(0.02)
            yield with_python(environment, python)
        finally:
            process.stdin.close()
            process.wait()


def with_python(environment, python: Path):
    """An `Environment` like this one with another `python`."""
    from pix2pix_zero.devtools.environment import Environment

    class Forking(Environment):
        @property
        def python(self) -> Path:
            return python

    return Forking(environment.comfyui, environment.folder)


def process_at(port: int) -> int:
    """The number of the process that listens at a port: a server's, also where what was started only asked for the fork."""
    import psutil

    at_it = (
        each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN and each.laddr.port == port
    )
    return next(each.pid for each in at_it)


def _serve(path: str) -> None:
    """Fork for each call at this socket, until our standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path + ".new")
        door.listen(64)
        os.rename(path + ".new", path)
        while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:
            _import_all()
            call, _ = door.accept()
            with call:
                if not os.fork():
                    try:
                        door.close()
                        _become(call)
                    finally:
                        os._exit(1)


@functools.cache
def _import_all() -> None:
    """At the first call, as there may be none."""
    _share_bytecode()
    gc.disable()  # all of it stays
    for name in HEAVY:
        if find_spec(name.partition(".")[0]) is not None:
            import_module(name)
    gc.collect()
    gc.freeze()
    gc.enable()


def _share_bytecode() -> None:
    """Keep it by files' real paths: the base directory of a server is a new one each time, with a link to the pack."""
    named = _bootstrap_external.cache_from_source
    _bootstrap_external.cache_from_source = lambda path, *rest, **more: named(os.path.realpath(path), *rest, **more)


def _become(call: socket.socket) -> None:
    """The Python that was called, with the arguments, variables, folder and files of the caller."""
    size, descriptors, *_ = socket.recv_fds(call, 8, 3)
    with call.makefile("rb") as stream:
        request = json.loads(stream.read(int.from_bytes(size, "big")))
    for target, source in enumerate(descriptors):
        os.dup2(source, target)
        os.close(source)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.pycache_prefix = os.environ.get("PYTHONPYCACHEPREFIX") or None
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    if "MALLOC_ARENA_MAX" in os.environ:  # which the C library has looked for when it began
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, int(os.environ["MALLOC_ARENA_MAX"]))
    threading.Thread(target=_end_with, args=(call,), daemon=True).start()
    status = _run(request["arguments"]) & 255
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with contextlib.suppress(OSError):
        call.sendall(bytes([status]))
    os._exit(status)


def _end_with(call: socket.socket) -> None:
    with contextlib.suppress(OSError):
        call.recv(1)  # the caller sends no more: it has ended
    os._exit(1)


def _run(arguments: list[str]) -> int:
    """The exit status of `python ARGUMENTS`: `-c PROGRAM ...`, `-m MODULE ...` or `FILE ...`, perhaps after `-u`."""
    if arguments[0] == "-u":  # unbuffered
        arguments = arguments[1:]
    try:
        if arguments[0] == "-c":
            sys.argv[:], sys.path[0] = ["-c", *arguments[2:]], ""
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), vars(main))  # noqa: S102
        elif arguments[0] == "-m":
            sys.argv[:], sys.path[0] = arguments[1:], os.getcwd()
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:], sys.path[0] = arguments, os.path.dirname(arguments[0])
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1])
