"""`python cluster pairs`: a folder of pictures through one workflow, on as many ComfyUI as there are."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .comfyui import START_PATIENCE, Start
from .connection import answered, cause, join, loss_in_words
from .pictures import Pictures, Progress, Task, list_pictures
from .results import Results
from .worker import FAILED, LOST, MADE, UNFIT, Answer, ServerSpec, Worker
from .workflow import ClusterError, Workflow, read_workflow

ACTORS = 60.0  # seconds that a cluster at ray:// has to take the actors in
LEAVING = 20.0  # and to let them go; they have half of it to cancel what they are at
BLAMES = 3  # pictures that a server failed at and another one made


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do. `servers`: one for each ComfyUI. `address`: of a Ray cluster, empty for this machine."""

    workflow: Path
    pictures: Path
    out: Path
    servers: tuple[ServerSpec, ...]
    gpus_each: float | None = None
    address: str = ""


@dataclass(eq=False)
class Server:
    """A ComfyUI as the run sees it."""

    name: str
    actor: object
    asked: float = 0.0  # when it was asked to start
    ready: bool = False
    blames: int = 0
    last_words: str = ""


def run(settings: Settings) -> int:
    """Make what is not there yet; 0 if none failed. Raises ClusterError."""
    workflow = read_workflow(settings.workflow)
    paths = list_pictures(settings.pictures)
    if settings.out.resolve() == settings.pictures.resolve():
        raise ClusterError("--out: it is the folder of the pictures. Use another one.")
    with Results(settings.out, workflow) as results:
        pictures = Pictures(paths, workflow, results)
        with _servers(settings, workflow) as servers:
            _work(pictures, servers, Progress(pictures))
    return 1 if pictures.failed else 0


def _work(pictures: Pictures, servers: list[Server], progress: Progress) -> None:
    """Hand pictures to servers until none is left."""
    import ray

    running: dict = {_start(server): (server, None) for server in servers}
    while True:
        busy = {server for server, _ in running.values()}
        ready = {server for server in servers if server.ready}
        soon = {server for server in servers if time.monotonic() - server.asked < START_PATIENCE}
        for server in ready - busy:
            if taken := pictures.take(server, ready | soon):
                task, content = taken
                running[server.actor.edit.remote(content, task.path.suffix)] = (server, task)
        if not len(pictures) and not any(task for _, task in running.values()):
            return progress.tell(len(ready), last=True)
        if not servers:
            raise ClusterError(
                f"no server is left for the last {len(pictures)} pictures. What is done is kept: mend a server and run the "
                "same command again."
            )
        for reference in ray.wait(list(running), num_returns=1, timeout=1.0)[0]:
            server, task = running.pop(reference)
            answer = _answer(reference)
            if task is None:
                _started(server, answer, servers, progress)
            elif answer.how == MADE:
                pictures.keep(task, answer.results)
                _blame(task.failed_by, server, servers)
            else:
                if _failed(server, task, answer, servers):
                    running[_start(server)] = (server, None)
                pictures.put_back(task)
        progress.tell(sum(server.ready for server in servers))


def _start(server: Server) -> object:
    server.asked = time.monotonic()
    return server.actor.start.options(max_task_retries=-1).remote()


def _answer(reference) -> Answer:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as failure:
        return Answer(LOST, f"Ray: {cause(failure)}")


def _started(server: Server, answer: Answer, servers: list[Server], progress: Progress) -> None:
    if answer.how != MADE:
        return _drop(server, answer.words, servers)
    server.ready = True
    progress.begin()


def _failed(server: Server, task: Task, answer: Answer, servers: list[Server]) -> bool:
    """Note that a picture was not made; whether the server, or who speaks to it, has to be started again."""
    if server not in servers:  # it was left out meanwhile
        return False
    if answer.how == UNFIT:  # which is not the picture's fault
        _drop(server, answer.words, servers)
        return False
    task.words.append(f"{server.name}: {answer.words}")
    task.failed_by.add(server)
    server.last_words = answer.words
    server.ready = answer.how == FAILED
    return not server.ready


def _blame(failed_by: set[Server], maker: Server, servers: list[Server]) -> None:
    """What one server made and others could not is their fault; after some of it they get no more pictures."""
    maker.blames = 0
    for other in failed_by & set(servers) - {maker}:
        other.blames += 1
        if other.blames >= BLAMES:
            words = f"it failed at {BLAMES} pictures that another server made, the last time: {other.last_words}"
            _drop(other, words, servers)


def _drop(server: Server, words: str, servers: list[Server]) -> None:
    import ray

    print(f"cluster: {server.name} is left out: {words}.", file=sys.stderr, flush=True)
    servers.remove(server)
    ray.kill(server.actor)


@contextlib.contextmanager
def _servers(settings: Settings, workflow: Workflow) -> Iterator[list[Server]]:
    """One actor for each ComfyUI, in a Ray of our own or in a cluster. Nothing of them is left behind."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else Ray starts one of its own when a cluster was lost
    from ray import cloudpickle

    _check_address(settings.address)
    options = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not settings.address:
        # on the loopback address, and with no more shared memory than some pictures need
        options |= {"_node_ip_address": "127.0.0.1", "include_dashboard": False, "num_cpus": 1}
        options |= {"object_store_memory": 256 * 2**20}
    print("Starting Ray ..." if not settings.address else f"Connecting to {settings.address} ...", flush=True)
    servers: list[Server] = []
    try:
        join(settings.address, options)
    except (OSError, RuntimeError, ValueError) as failure:  # ConnectionError is an OSError
        where = f"with the cluster at {settings.address}" if settings.address else "here"
        raise ClusterError(f"Ray does not start {where}: {cause(failure)}") from failure
    # other machines of a cluster need Ray, but not this pack
    cloudpickle.register_pickle_by_value(sys.modules[__package__])
    try:
        with _signals(), loss_in_words(settings.address):
            servers += answered(settings.address, ACTORS, lambda: _actors(settings, workflow))
            yield servers
    finally:
        with contextlib.suppress(ClusterError):  # it does not answer any more
            answered(settings.address, LEAVING, lambda: _end(servers))


def _check_address(address: str) -> None:
    """Raises ClusterError if nothing listens there, where Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), 10).close()
        except OSError as failure:
            raise ClusterError(f"--address: no Ray answers at {address} ({failure.strerror or failure}).") from failure


def _actors(settings: Settings, workflow: Workflow) -> list[Server]:
    import ray

    own = [spec for spec in settings.servers if spec.start]
    there = ray.cluster_resources().get("GPU", 0)
    each = settings.gpus_each if settings.gpus_each is not None else (1 if there else 0)
    if own and each * len(own) > there:
        raise ClusterError(
            f"--spawn: {len(own)} servers with {each:g} GPUs each were asked for, and Ray sees {there:g}. Ask for fewer, or "
            "let several share one with --gpus-each."
        )
    # a picture is tried again here, perhaps elsewhere; a start waits until Ray has brought a lost actor back
    options = {"max_restarts": -1, "max_concurrency": 2, "scheduling_strategy": "SPREAD", "num_cpus": 0}
    servers = []
    for number, spec in enumerate(settings.servers, 1):
        actor = ray.remote(**options, num_gpus=0 if spec.url else each)(Worker).remote(spec, workflow)
        servers.append(Server(spec.url or f"server {number}", actor))
    return servers


def _end(servers: list[Server]) -> None:
    import ray

    with contextlib.suppress(Exception):  # whatever state it is in, shutdown ends it
        ray.wait([server.actor.stop.remote() for server in servers], num_returns=len(servers), timeout=LEAVING / 2)
    ray.shutdown()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end the run in order, also where a shell has switched them off."""

    def end(*_) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    previous = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def specs(servers: str, spawn: int, start: Start | None, patience: float, away: float) -> tuple[ServerSpec, ...]:
    """One for each server that the command line names."""
    if spawn:
        return (ServerSpec(start=start, patience=patience),) * spawn
    urls = [url.strip() for url in servers.split(",") if url.strip()]
    urls = list(dict.fromkeys(url if "://" in url else f"http://{url}" for url in urls))
    return tuple(ServerSpec(url=url, patience=patience, away=away) for url in urls)
