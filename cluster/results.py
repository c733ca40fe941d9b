"""The folder that results go to: what is there is done, and each file is put in place by renaming.

Of a workflow that saves pairs, in the layout of *Save Edit Pair*, which *Distill Edit* reads:

    OUT/source/KEY.png, OUT/edited/KEY.png, OUT/mask/KEY.png, OUT/edited/KEY.txt

Of one that saves pictures: OUT/NAME-KEY.png, after the picture it was made of. Further results of one picture have a number
behind the key. The first is written last, and edited/ last of a pair, so that what is there is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..editing.writing import clear_leftovers, write_whole
from .workflow import ClusterError, Workflow

MANIFEST, FAILED, LEFT_OUT = "manifest.json", "failed.jsonl", "left_out.jsonl"
LETTERS = 16  # of the key, in the name of a picture
# A pair, or one picture under the name "edited": the kind of file, and its content.
Result = Mapping[str, bytes]


class Results:
    """The folder, held by one run at a time; use it in a `with` block.

    Raises ClusterError, there and later, where the folder is in use, belongs to another workflow or cannot be written.
    """

    def __init__(self, folder: Path, workflow: Workflow) -> None:
        self.folder = folder
        self.workflow = workflow
        self._done: set[str] = set()

    def __enter__(self) -> Results:
        self._written(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        self._written(self._hold)
        try:
            self._written(self._begin)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._lock.release()

    def __contains__(self, key: str) -> bool:
        return self._name(key) in self._done

    def commit(self, key: str, picture: Path, results: Sequence[Result]) -> None:
        """Keep what a picture became; nothing: it is noted as left out."""
        if not results:
            line = json.dumps({"key": key, "picture": str(picture)})
            self._written(lambda: _append(self.folder / LEFT_OUT, line))
        for number, result in reversed(list(enumerate(results, 1))):
            name = self._name(key) + (f"_{number}" if number > 1 else "")
            files = self._pair(name, result) if self.workflow.makes_pairs else self._picture(name, picture, result)
            for path, content in files.items():
                self._written(lambda path=path, content=content: write_whole(path, content))
        self._done.add(self._name(key))

    def fail(self, key: str, picture: Path, words: Sequence[str]) -> None:
        """Note what went wrong with a picture, once for each try."""
        line = json.dumps({"picture": str(picture), "key": key, "words": list(words)}, ensure_ascii=False)
        self._written(lambda: _append(self.folder / FAILED, line))

    def _hold(self) -> None:
        from filelock import FileLock, Timeout  # Ray brings it

        self._lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ClusterError(
                f"--out: another run writes to {self.folder}. Wait for it, or use another folder."
            ) from None

    def _begin(self) -> None:
        manifest, wanted = self.folder / MANIFEST, {"workflow": self.workflow.digest}
        folders = [self.folder]
        if self.workflow.makes_pairs:
            folders = [self.folder / name for name in ("source", "edited", "mask")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
            clear_leftovers(folder, seconds=0)  # of a run that was killed: the folder is this run's now
        there = {path.stem for path in folders[min(1, len(folders) - 1)].glob("*.png") if not path.name.startswith(".")}
        if manifest.is_file():
            try:
                found = json.loads(manifest.read_text(encoding="utf-8")).get("workflow")
            except (ValueError, AttributeError):
                found = None
            if found != wanted["workflow"]:
                raise ClusterError(
                    f"--out: what is in {self.folder} was made by another workflow. Use another folder, or delete this one."
                )
        elif there:
            raise ClusterError(
                f"--out: {self.folder} already holds pictures that no run of this program made. Use another folder."
            )
        else:
            write_whole(manifest, (json.dumps(wanted) + "\n").encode())
        (self.folder / FAILED).unlink(missing_ok=True)  # those are tried again
        self._done = there if self.workflow.makes_pairs else {name.rpartition("-")[2] for name in there}
        self._done |= {self._name(key) for key in _keys(self.folder / LEFT_OUT)}

    def _name(self, key: str) -> str:
        return key if self.workflow.makes_pairs else key[:LETTERS]

    def _pair(self, name: str, result: Result) -> dict[Path, bytes]:
        files = {}
        for kind in ("source", "mask", "caption", "edited"):  # in this order
            if kind in result:
                path = ("edited", f"{name}.txt") if kind == "caption" else (kind, f"{name}.png")
                files[self.folder.joinpath(*path)] = result[kind]
        return files

    def _picture(self, name: str, picture: Path, result: Result) -> dict[Path, bytes]:
        return {self.folder / f"{picture.stem}-{name}.png": result["edited"]}

    def _written(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as failure:
            raise ClusterError(
                f"--out: {self.folder} cannot be written ({failure.strerror or failure}). Nothing is half-written; make "
                "room or give rights, then run the same command again."
            ) from failure


def _append(path: Path, line: str) -> None:
    """Add a line to a file, all of it or nothing."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError:
        if path.is_file():
            os.truncate(path, size)
        raise


def _keys(path: Path) -> set[str]:
    """The keys in a file of lines; a line that was cut off is forgotten."""
    if not path.is_file():
        return set()
    keys, whole = set(), []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            keys.add(json.loads(line)["key"])
            whole.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, "".join(whole).encode())
    return keys
