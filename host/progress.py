"""What a running node says about itself: a line of text on the node, and one progress bar for all of its runs."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_run: ContextVar[tuple[int, int]] = ContextVar("pix2pix_zero_run", default=(0, 1))


def runs(count: int) -> Iterator[int]:
    """0 to `count` - 1: the runs of a node over a list of pictures. Text and progress within each tell which one it is."""
    for index in range(count):
        token = _run.set((index, count))
        try:
            yield index
        finally:
            _run.reset(token)


def show(text: str) -> None:
    """Write a line on the node that is running. Outside a server, and in hosts that have no such line, nothing happens."""
    # Looked up rather than imported: importing it would start half a server in a script.
    host, execution = sys.modules.get("server"), sys.modules.get("comfy_execution.utils")
    server = getattr(getattr(host, "PromptServer", None), "instance", None)
    send = getattr(server, "send_progress_text", None)
    context = execution.get_executing_context() if send is not None and execution is not None else None
    if context is not None:
        index, count = _run.get()
        send(f"Picture {index + 1}/{count}: {text[:1].lower()}{text[1:]}" if count > 1 else text, context.node_id)


def run_count() -> int:
    """How many runs the node that is running makes of its lists."""
    return _run.get()[1]


def warn(text: str) -> None:
    """Leave a warning on the node that is running, and in the log."""
    logging.warning("Pix2Pix-Zero: %s", text)
    show(text)


def over_runs(callback: Callable) -> Callable:
    """A sampler's callback (step, x0, x, steps) whose progress goes on from run to run."""

    def report(step, x0, x, steps):
        index, count = _run.get()
        callback(index * steps + step, x0, x, count * steps)

    return report
