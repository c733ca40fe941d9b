"""`dev.py soak`: random edits, bad inputs, interrupts and clients at once on a real server, and a table of what grew.

Every run is drawn from the seed and its own number, so a failure is found again by both.
"""

import argparse
import collections
import hashlib
import io
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from PIL import Image

from .environment import running
from .process import DevError, one_thread, told
from .server import GraphError, Progress, Server
from .soak_runs import Case, bad_input, damaged_file, long_run, random_edit, reference

KINDS = {"edit": 60, "bad input": 20, "damaged file": 5, "interrupt": 10, "clients at once": 5}
"""Of a hundred runs."""
CLIENTS = 3
REFERENCE_EVERY = 10  # runs
WARM_UP = 2  # references: libraries and models are loaded by then
# More growth than this after the warm-up is a fault.
MOST_GROWTH = {"memory": 300.0, "threads": 8.0, "open files": 8.0, "leftover files": 0.0}
LOGGED_FAULTS = ("Exception ignored", "memory leak", "was never awaited")


@dataclass(frozen=True)
class Level:
    """What the server holds after so many runs: MB, threads, open files, unfinished files on disk."""

    runs: int
    memory: float
    threads: int
    open_files: int
    leftover_files: int

    def figures(self) -> dict[str, float]:
        """By the names of the table."""
        return {
            "memory": self.memory,
            "threads": self.threads,
            "open files": self.open_files,
            "leftover files": self.leftover_files,
        }


@dataclass
class Outcome:
    """What a soak has seen. `failures`: number of the run, its kind, and what went wrong."""

    done: collections.Counter = field(default_factory=collections.Counter)
    refused: collections.Counter = field(default_factory=collections.Counter)
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    slowest_interrupt: float = 0.0

    @property
    def runs(self) -> int:
        """How many runs there were, whatever became of them."""
        return self.done.total() + self.refused.total() + len(self.failures)

    def growth(self) -> dict[str, float]:
        """What has been added since the warm-up; of memory the difference of the medians of the first and last third."""
        levels = self.levels[WARM_UP:]
        if len(levels) < 2:
            return dict.fromkeys(MOST_GROWTH, 0.0)
        growth = {name: levels[-1].figures()[name] - value for name, value in levels[0].figures().items()}
        third = max(1, len(levels) // 3)
        growth["memory"] = _median(levels[-third:]) - _median(levels[:third])
        return growth

    def faults(self) -> list[str]:
        """All that is wrong, in words."""
        faults = [f"run {number}, {kind}: {reason}" for number, kind, reason in self.failures]
        if len(set(self.pictures)) > 1:
            changed = next(index for index, picture in enumerate(self.pictures) if picture != self.pictures[0])
            faults.append(f"the reference picture is another one from its {changed + 1}. time on")
        for name, amount in self.growth().items():
            if amount > MOST_GROWTH[name]:
                faults.append(f"{name} grew by {amount:.0f}, which is more than {MOST_GROWTH[name]:.0f}")
        return faults

    def table(self) -> str:
        """The report, in Markdown."""
        rows = ["| runs | memory, MB | threads | open files | leftover files |", "|---|---|---|---|---|"]
        every = max(1, len(self.levels) // 10)
        for level in [*self.levels[:WARM_UP], *self.levels[WARM_UP::every], *self.levels[-1:]]:
            figures = " | ".join(f"{value:.0f}" for value in level.figures().values())
            row = f"| {level.runs} | {figures} |"
            rows += [row] if row not in rows else []
        growth = self.growth()
        rows.append("| growth | " + " | ".join(f"{value:+.0f}" for value in growth.values()) + " |")
        rows += ["", "| kind | done | refused in words | failed |", "|---|---|---|---|"]
        failed = collections.Counter(kind for _, kind, _ in self.failures)
        for kind in (*KINDS, "log"):
            rows.append(f"| {kind} | {self.done[kind]} | {self.refused[kind]} | {failed[kind]} |")
        same = "the same bit for bit" if len(set(self.pictures)) == 1 else "NOT the same"
        rows += ["", f"{self.runs} runs. The reference picture, drawn {len(self.pictures)} times: {same}."]
        rows.append(f"From an interrupt to its end: {self.slowest_interrupt:.1f} s at most.")
        return "\n".join([*rows, "", *self.faults()])


def _median(levels: list[Level]) -> float:
    return sorted(level.memory for level in levels)[len(levels) // 2]


class Soak:
    """Random runs on one server. `base`: its base directory."""

    def __init__(self, server: Server, base: Path, seed: int) -> None:
        self.server, self.base, self.seed = server, base, seed
        self.schemas = server.object_info()
        self.process = psutil.Process(server.process_id)
        self.outcome = Outcome()
        self._logged = 0

    def until(self, end: float, runs: int | None = None) -> Iterator[Outcome]:
        """Run until `time.monotonic()` is `end`, or so many times; what was seen so far, after each reference picture.

        The reference picture is drawn before the first run, now and then, and after the last.
        """
        self.compare()
        yield self.outcome
        number = 0
        while time.monotonic() < end and number != runs:
            number += 1
            self.one(number)
            if number % REFERENCE_EVERY == 0:
                self.compare()
                yield self.outcome
        if number % REFERENCE_EVERY:
            self.compare()
            yield self.outcome

    def one(self, number: int) -> None:
        """Carry out the run of this number."""
        draw = random.Random(f"{self.seed}:{number}")
        (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
        try:
            run = getattr(self, "_" + kind.replace(" ", "_"))
            done = run(draw)
        except (GraphError, OSError) as error:
            self.outcome.failures.append((number, kind, f"{error!s:.500}"))
        else:
            (self.outcome.done if done else self.outcome.refused)[kind] += 1
        self._read_log(number)

    def compare(self) -> None:
        """Draw the reference picture anew, in a server that has unloaded all, and note what the server holds."""
        self.server.free()
        self.outcome.pictures.append(self._reference(self.server, f"nonce {len(self.outcome.pictures)}"))
        leftovers = [path for path in self.base.rglob(".*") if path.is_file()]
        self.outcome.levels.append(
            Level(
                self.outcome.runs,
                self._memory() / 1e6,
                self.process.num_threads(),
                self.process.num_fds() if hasattr(self.process, "num_fds") else self.process.num_handles(),
                len(leftovers),
            )
        )

    def _memory(self) -> int:
        """Bytes, without what is mapped from files where the system tells: a machine short of memory drops and reads those."""
        memory = self.process.memory_info()
        return memory.rss - getattr(memory, "shared", 0)

    def _reference(self, client: Server, nonce: str) -> str:
        graph, shown = reference(nonce, self.schemas)
        picture = client.view(client.run(graph)[shown]["images"][0])
        return hashlib.sha256(Image.open(io.BytesIO(picture)).tobytes()).hexdigest()

    def _edit(self, draw: random.Random) -> bool:
        return self._carried_out(self.server, random_edit(draw, self.schemas))

    def _bad_input(self, draw: random.Random) -> bool:
        return self._carried_out(self.server, bad_input(draw, self.schemas))

    def _damaged_file(self, draw: random.Random) -> bool:
        folder = self.base / "models" / "pix2pix_zero" / "directions"
        folder.mkdir(parents=True, exist_ok=True)
        case, path = damaged_file(draw, self.schemas, folder)
        try:
            return self._carried_out(self.server, case)
        finally:
            path.unlink()

    def _interrupt(self, draw: random.Random) -> bool:
        """Cancel a long run somewhere. True: it was cancelled."""
        messages = draw.randrange(1, 40)
        cancelled_at = 0.0

        def cancel(_: Progress) -> None:
            nonlocal messages, cancelled_at
            messages -= 1
            if messages == 0:
                cancelled_at = time.monotonic()
                self.server.interrupt()

        try:
            self.server.run(long_run(draw, self.schemas), cancel)
        except GraphError as error:
            if "was cancelled" not in str(error):
                raise
            self.outcome.slowest_interrupt = max(self.outcome.slowest_interrupt, time.monotonic() - cancelled_at)
            return True
        raise GraphError("it was cancelled and ran to its end")

    def _clients_at_once(self, draw: random.Random) -> bool:
        """Edits of several clients at the same time, one of them the reference picture. True: it was the right one."""
        cases = [random_edit(draw, self.schemas) for _ in range(CLIENTS - 1)]
        with ThreadPoolExecutor(CLIENTS) as threads:
            nonce = f"nonce {draw.random()}"
            picture = threads.submit(self._reference, self.server.another_client(), nonce)
            others = [threads.submit(self._carried_out, self.server.another_client(), case) for case in cases]
            for other in others:
                other.result()
        if picture.result() != self.outcome.pictures[0]:
            raise GraphError("the reference picture is another one beside other clients")
        return True

    def _carried_out(self, client: Server, case: Case) -> bool:
        """Run a graph; True: it gave results, False: it was refused in words.

        Raises GraphError: it failed in other words, or was to be refused and was not.
        """
        try:
            outputs = client.run(case.graph)
        except GraphError as error:
            if not in_words(error, self.schemas):
                raise GraphError(f"{case.what}: {error}") from None
            return False
        if case.must_be_refused:
            raise GraphError(f"{case.what}: it was not refused")
        if not outputs:
            raise GraphError(f"{case.what}: it ended without a result")
        return True

    def _read_log(self, number: int) -> None:
        """Count what the server's log tells of by the way."""
        with self.server.log.open("rb") as log:
            log.seek(self._logged)
            text = log.read()
            self._logged = log.tell()
        for line in text.decode(errors="replace").splitlines():
            if any(fault in line for fault in LOGGED_FAULTS):
                self.outcome.failures.append((number, "log", line.strip()))


def in_words(error: GraphError, schemas: dict | None = None) -> bool:
    """Whether a graph was refused in words that name sockets: by the server's own check, or by the node that failed.

    `schemas`: the server's, where a node may name a socket that nothing is connected to.
    """
    details = error.details
    if "node_errors" in details or "error" in details:
        return True
    named = str(details.get("exception_message", "")).partition(":")[0].split(", ")
    inputs = set(details.get("current_inputs") or {})
    for sockets in (schemas or {}).get(details.get("node_type"), {}).get("input", {}).values():
        inputs.update(sockets)
    kind = str(details.get("exception_type")).rpartition(".")[2]
    return kind in ("ValueError", "OutOfMemoryError", "MemoryError") and inputs.issuperset(named)


def soak(minutes: float, seed: int, runs: int | None = None) -> Outcome:
    """Let random runs go on for so many minutes on a server of its own, or until there were so many; what was seen.

    Prints the table now and then, and at the end.
    """
    variables = {**one_thread(), "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryDirectory(prefix="pix2pix-zero-soak-", ignore_cleanup_errors=True) as folder,
        Server(running(), keep=Path(folder), options=["--disable-api-nodes"], variables=variables) as server,
    ):
        print(f"A server on {server.url}, {minutes:g} minutes, seed {seed} (log: {server.log})", flush=True)
        end = time.monotonic() + 60 * minutes
        told_at = 0
        for outcome in Soak(server, Path(folder), seed).until(end, runs):
            left = end - time.monotonic()
            if 0 < left < 60 * minutes * (1 - told_at / 10):
                told_at += 1
                print(f"\n{outcome.table()}", flush=True)
    print(f"\n{outcome.table()}", flush=True)
    return outcome


def main() -> int:
    """Soak as the arguments say; 1 when something is wrong."""
    parser = argparse.ArgumentParser(prog="dev.py soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another number, other runs (default: %(default)s)")
    parser.add_argument("--runs", type=int, help="stop after so many, if that is sooner")
    options = parser.parse_args()
    if not options.minutes > 0:
        raise DevError("--minutes: enter a number above 0.")
    if options.runs is not None and options.runs < 1:
        raise DevError("--runs: enter a number above 0.")
    return 1 if soak(options.minutes, options.seed, options.runs).faults() else 0


if __name__ == "__main__":
    sys.exit(told(main))
