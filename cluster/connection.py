"""Joining a Ray, where no wait for a cluster that does not answer is without end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import TypeVar

from .workflow import ClusterError

# Seconds for each attempt at ray://. A head that cannot start what serves us says so after 30; one that has much else to do
# may need more than that, so the later attempts get more.
ATTEMPTS = (45.0, 90.0, 135.0, 180.0)
CLOSING = 15.0  # seconds in which a wait ends whose connection was closed; Ray needs 5 at most
LOOK = 0.2  # Ctrl-C is heard so often, also on Windows, where it does not end a wait
WHAT_TO_DO = (
    "Look into ray_client_server*.err in the logs of Ray's head, and start it again as the page cluster/README.md says "
    "under 'On a Ray cluster', or run this command on one of its machines with --address HEAD:6379."
)

Answered = TypeVar("Answered")


class Unanswered(Exception):
    """A cluster did not answer in time. `again`: whether Ray's client has let go of it, so that it can begin anew."""

    def __init__(self, words: str, again: bool) -> None:
        super().__init__(words)
        self.again = again


def is_remote(address: str) -> bool:
    """Whether Ray's client speaks to the cluster. Elsewhere Ray itself says what it waits for, and gives up."""
    return address.startswith("ray://")


def join(address: str, options: dict) -> None:
    """Start or join Ray; a cluster at ray:// that does not take us in is asked again.

    Raises ClusterError: it did not at any attempt. Others: what Ray raises.
    """
    import ray

    if not is_remote(address):
        ray.init(address=address or "local", **options)
        return
    from grpc import RpcError

    for attempt, seconds in enumerate(ATTEMPTS, 1):
        try:
            within(seconds, lambda: ray.init(address=address, **options))
            return
        except (ConnectionAbortedError, RpcError, Unanswered) as failure:
            stuck = isinstance(failure, Unanswered) and not failure.again
            if attempt == len(ATTEMPTS) or stuck:
                raise ClusterError(f"{address} does not take us in: {cause(failure)}. {WHAT_TO_DO}") from failure
            print(f"Not connected ({cause(failure)}). Trying again ({attempt} of {len(ATTEMPTS) - 1}) ...", flush=True)


def answered(address: str, seconds: float, ask: Callable[[], Answered]) -> Answered:
    """What `ask` returns, which waits for the Ray that was joined.

    Raises ClusterError: a cluster at ray:// took too many seconds, or was lost. Others: what `ask` raises.
    """
    with loss_in_words(address):
        return within(seconds, ask) if is_remote(address) else ask()


@contextlib.contextmanager
def loss_in_words(address: str) -> Iterator[None]:
    """Raises ClusterError: a cluster at ray:// was lost, or took too long. Ray itself notices a lost machine in 11 minutes."""
    if not is_remote(address):
        yield
        return
    from grpc import RpcError

    try:
        yield
    except (ConnectionError, RpcError, Unanswered) as failure:
        raise ClusterError(f"{address} answers no more: {cause(failure)}. {WHAT_TO_DO}") from failure


def within(seconds: float, ask: Callable[[], Answered]) -> Answered:
    """What `ask` returns, which waits for a cluster at ray://.

    Ray's client waits for answers without a limit: for the first one while the head starts what serves us, and when that
    fails for the end of its log. So a thread waits for it, and after so many seconds its connection is closed under it.

    Raises Unanswered: too many seconds. Others: what `ask` raises.
    """
    answer: futures.Future[Answered] = futures.Future()

    def wait() -> None:
        try:
            answer.set_result(ask())
        except BaseException as failure:
            answer.set_exception(failure)

    threading.Thread(target=wait, daemon=True).start()
    try:
        _wait(answer, seconds)
        if answer.done():
            return answer.result()
    except KeyboardInterrupt:
        _close()
        raise
    _wait(answer, CLOSING, _close)
    if answer.done():
        _close()  # what was opened at that very moment
        if isinstance(answer.exception(), ConnectionAbortedError):
            raise answer.exception()  # the head's own words, after which Ray's client waited for the rest of its log
    raise Unanswered(f"no answer within {seconds:g} s", again=answer.done())


def _wait(answer: futures.Future, seconds: float, between: Callable[[], None] = lambda: None) -> None:
    until = time.monotonic() + seconds
    while not answer.done() and time.monotonic() < until:
        between()
        futures.wait([answer], LOOK)


def _close() -> None:
    """Close the connection of Ray's client, and then the client, which would wait for the end of a living one."""
    import ray
    from ray.util import client

    worker = client.ray.get_context().client_worker
    if worker and worker.channel:
        worker.channel.close()
    ray.shutdown()


def cause(failure: Exception) -> str:
    """The line of Ray's words that says what happened: the last one of a traceback, else the first."""
    words = failure.details() if hasattr(failure, "details") else str(failure)  # of gRPC
    lines = [line.strip() for line in (words or "").splitlines() if line.strip()] or [type(failure).__name__]
    return lines[-1] if any(line.startswith(('File "', "Traceback")) for line in lines) else lines[0]
