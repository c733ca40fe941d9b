"""The pictures of a run: which are still to be made, and how far it is."""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from .results import FAILED, LEFT_OUT, Result, Results
from .workflow import ClusterError, Workflow

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
TRIES = 3


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder by name, numbers counted. Raises ClusterError if there is none."""
    try:
        found = [path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file()]
    except OSError as failure:
        raise ClusterError(f"--pictures: {folder} cannot be read ({failure.strerror or failure}).") from failure
    found = [path for path in found if not path.name.startswith(".")]
    if not found:
        raise ClusterError(f"--pictures: there is no picture in {folder}. It takes {', '.join(ENDINGS)}.")
    return sorted(found, key=lambda path: ([_counted(part) for part in re.split(r"(\d+)", path.name)], path.name))


def _counted(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (-1, part.lower())


def is_cut_off(content: bytes) -> bool:
    """Whether a file ends before its picture does. ComfyUI would take it, and draw the rest grey."""
    if content.startswith(b"\x89PNG"):
        return b"IEND" not in content
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    if content.startswith(b"\xff\xd8"):
        place = 2
        # segments up to the scan, which a thumbnail in one of them does not end
        while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        return b"\xff\xd9" not in content[place:]
    return False


@dataclass(eq=False)
class Task:
    """A picture that is to be made. `words`: of each try that failed; `failed_by`: the servers of those."""

    path: Path
    key: str
    words: list[str] = field(default_factory=list)
    failed_by: set[object] = field(default_factory=set)


class Pictures:
    """Hands out what is still to be made, and counts what becomes of it. Files are read one at a time."""

    def __init__(self, paths: list[Path], workflow: Workflow, results: Results) -> None:
        self.total = len(paths)
        self.there = self.made = self.left_out = self.failed = 0
        self._workflow, self._results = workflow, results
        self._fresh = deque(paths)
        self._again: deque[Task] = deque()
        self._taken: set[str] = set()

    def __len__(self) -> int:
        return len(self._fresh) + len(self._again)

    def take(self, server: object, servers: set[object]) -> tuple[Task, bytes] | None:
        """The next one for a server. One that failed goes to another one of `servers`, those that can be counted on."""
        for task in [task for task in self._again if server not in task.failed_by or servers <= task.failed_by]:
            self._again.remove(task)
            if content := self._read(task):
                return task, content
        while self._fresh:
            task = Task(self._fresh.popleft(), "")
            if not (content := self._read(task)):
                continue
            task.key = self._workflow.key(content)
            if task.key in self._results or task.key in self._taken:
                self.there += 1
            else:
                self._taken.add(task.key)
                return task, content
        return None

    def keep(self, task: Task, results: list[Result]) -> None:
        """A picture is made, or left out if there is no result."""
        self._results.commit(task.key, task.path, results)
        self.made += bool(results)
        self.left_out += not results

    def put_back(self, task: Task) -> None:
        """Try a picture again, or give it up after three tries."""
        if len(task.words) < TRIES:
            self._again.append(task)
        else:
            self._give_up(task)

    def _read(self, task: Task) -> bytes:
        try:
            content, words = task.path.read_bytes(), "its end is missing"
        except OSError as failure:
            content, words = b"", f"it cannot be read ({failure.strerror or failure})"
        if content and not is_cut_off(content):
            return content
        task.words.append(words)
        self._give_up(task)
        return b""

    def _give_up(self, task: Task) -> None:
        self._results.fail(task.key, task.path, task.words)
        self.failed += 1


class Progress:
    """Tells how far a run is: one changing line on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._begin: float | None = None
        self._told = 0.0

    def begin(self) -> None:
        """The first server works."""
        self._begin = self._begin or time.monotonic()

    def tell(self, servers: int, last: bool = False) -> None:
        """Write the line if it is time for it. `servers`: how many work."""
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if last or now - self._told >= (0.5 if terminal else 10.0):
            self._told = now
            start, end = ("\r\x1b[K", "\n" if last else "") if terminal else ("", "\n")
            print(f"{start}{self._line(servers, now)}", end=end, flush=True)

    def _line(self, servers: int, now: float) -> str:
        counts = self._pictures
        done = counts.made + counts.left_out + counts.failed
        line = f"{done + counts.there} of {counts.total}"
        parts = (
            (counts.there, "already there"),
            (counts.left_out, f"left out ({LEFT_OUT})"),
            (counts.failed, f"failed ({FAILED})"),
        )
        line += "".join(f", {count} {words}" for count, words in parts if count)
        if done and self._begin is not None:
            rate = done / max(now - self._begin, 1e-9)
            line += f"; {_rate(rate)}" + (f", {_span(len(counts) / rate)} left" if len(counts) else "")
        return f"{line}; servers: {servers}"


def _rate(a_second: float) -> str:
    return f"{a_second * 60:.0f} a minute" if a_second > 0.5 else f"{a_second * 3600:.0f} an hour"


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "under a minute"
    )
