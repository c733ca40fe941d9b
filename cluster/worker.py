"""One ComfyUI and what it is asked to do: the class that Ray runs as an actor."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from .comfyui import Cancelled, Client, OwnServer, PictureFailed, ServerLost, ServerUnfit, Start
from .workflow import Workflow

MADE, FAILED, LOST, UNFIT = "made", "failed", "lost", "unfit"
CANCELLING = 8.0  # seconds that a server may take to hear that a picture is wanted no longer


@dataclass(frozen=True)
class ServerSpec:
    """A server: its address, or how to start one.

    `patience`: seconds that a picture may take. `away`: seconds that a server at an address may be down.
    """

    url: str = ""
    start: Start | None = None
    patience: float = 3600.0
    away: float = 60.0


@dataclass(frozen=True)
class Answer:
    """How a task ended: made, failed, lost (the server is gone) or unfit, and the words or results that belong to it."""

    how: str
    words: str = ""
    results: list[dict[str, bytes]] = field(default_factory=list)


class Worker:
    """Keeps one server and sends it one picture at a time. Its methods answer and do not raise."""

    def __init__(self, spec: ServerSpec, workflow: Workflow) -> None:
        self._spec, self._workflow = spec, workflow
        self._own: OwnServer | None = None
        self._client: Client | None = None
        self._stop, self._busy = threading.Event(), threading.Lock()

    def start(self) -> Answer:
        """Bring the server up, if it is not, and check that it can run the workflow."""
        try:
            if self._spec.start:
                self._start_own()
            else:
                self._client = self._client or Client(self._spec.url, self._spec.patience)
                self._wait_for_given()
            self._client.check(self._workflow)
        except (ServerUnfit, ServerLost) as failure:
            return Answer(UNFIT, str(failure))
        except Cancelled:
            return Answer(UNFIT, "it was stopped")
        return Answer(MADE, self._client.url)

    def edit(self, picture: bytes, ending: str) -> Answer:
        """What a picture becomes."""
        try:
            with self._busy:
                results = self._client.edit(self._workflow, picture, ending, self._stop)
        except PictureFailed as failure:
            return Answer(FAILED, str(failure))
        except ServerUnfit as failure:
            return Answer(UNFIT, str(failure))
        except (ServerLost, Cancelled) as failure:
            return Answer(LOST, str(failure))
        if self._own:
            self._own.tidy()
        return Answer(MADE, results=results)

    def stop(self) -> None:
        """Cancel what runs, and end a server of our own. The actor goes after this, so it waits for the cancelling."""
        self._stop.set()
        if self._busy.acquire(timeout=CANCELLING):
            self._busy.release()
        if self._own:
            self._own.stop()

    def _start_own(self) -> None:
        if self._own and self._own.runs and self._client.answers():
            return
        if self._own:
            self._own.stop()
        self._own = OwnServer(self._spec.start)
        self._client = Client(self._own.url, self._spec.patience)
        self._own.wait_until_ready(self._client, self._stop)

    def _wait_for_given(self) -> None:
        deadline = time.monotonic() + self._spec.away
        while not self._client.answers() and time.monotonic() < deadline:
            if self._stop.wait(1.0):
                raise Cancelled
