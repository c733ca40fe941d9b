"""Child processes that never outlive us, and errors told in one line."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path


class DevError(Exception):
    """Something the person has to know, told in one line."""


CAUSES = (
    (r"do not match the hashes|hash mismatch", "a download does not have the expected SHA-256"),
    (r"no space left", "the disk is full"),
    (
        r"name resolution|name or service not known|failed to establish|dns error|could not connect|timed out|proxyerror"
        r"|connection (refused|reset)|network is unreachable|error sending request|no matching distribution|failed to fetch",
        "the package index cannot be reached; check the network",
    ),
    (r"permission denied", "a file or folder may not be written"),
)


def cause_of(log: str) -> str:
    """The likely cause of a failed installation, from what the installer wrote."""
    for pattern, cause in CAUSES:
        if re.search(pattern, log, re.IGNORECASE):
            return cause
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"


class Job:
    """A command that writes to a log file and is stopped when its `with` block ends early."""

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=env,
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        stop(self._process)

    def finish(self, what: str) -> None:
        """Wait for the end.

        Raises DevError: the command failed; names `what` could not be done, the likely cause and the log.
        """
        if self._process.wait() != 0:
            cause = cause_of(self.log.read_text(encoding="utf-8", errors="replace"))
            raise DevError(f"Could not {what}: {cause}. Run the same command again to resume (log: {self.log}).")


def stop(process: subprocess.Popen, patience: float = 10.0) -> None:
    """End a child process, first politely."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run(command: Sequence[str | Path], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> int:
    """Run a command in the foreground and return its exit status; it ends when we are ended."""
    sys.stdout.flush()
    process = subprocess.Popen([str(part) for part in command], cwd=cwd, env=env)
    try:
        return process.wait()
    finally:
        stop(process)


def _end(signum: int, _frame) -> None:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Turn SIGTERM and a closed terminal into SystemExit, so that every `finally` and `with` runs.

    SIGINT is set too: a shell starts background jobs with it ignored.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    previous = {number: signal.signal(number, _end) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def told(command: Callable[[], int]) -> int:
    """The exit status of a command; what went wrong is told in one line."""
    try:
        with orderly_end():
            return command()
    except DevError as failure:
        print(f"dev.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def clean_environment(**changes: str) -> dict[str, str]:
    """Our environment without what would make a child use another Python's packages."""
    dropped = {"PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "PIP_USER"}
    return {**{name: value for name, value in os.environ.items() if name not in dropped}, **changes}


def one_thread() -> dict[str, str]:
    """One thread for torch, unless the person says otherwise.

    The demo model's tensors are too small to share, and on a busy machine threads that wait for each other take minutes.
    """
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
