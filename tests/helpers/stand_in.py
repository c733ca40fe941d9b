"""A stand-in for a ComfyUI server, with the faults that a test gives it."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web

KNOWN = ("LoadImage", "ImageInvert", "SaveImage", "PreviewImage", "Pix2PixZeroSavePair")


@dataclass
class StandIn:
    """Answers to what `cluster` asks; use it in a `with` block.

    `outputs`: what a picture becomes, as the server's history has it, by its content; a text is the words of a failure,
    None never ends. `log`: the paths that were asked for.
    """

    outputs: Callable[[bytes], dict | str | None] = lambda content: {"images": [file_of(content)]}
    version: str = "0.30.0"
    nodes: tuple[str, ...] = KNOWN
    log: list[str] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)

    def __enter__(self) -> StandIn:
        self._loop = asyncio.new_event_loop()
        self._uploaded: dict[str, bytes] = {}
        self._history: dict[str, dict] = {}
        self._queue: list[str] = []
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.strip("/")
        self.log.append(f"{request.method} {path}")
        if path == "upload/image":
            form = await request.post()
            self._uploaded[f"{form['image'].filename} [{form['type']}]"] = form["image"].file.read()
            return web.json_response({})
        if path == "view":
            kind = request.query["subfolder"].rpartition("/")[2]
            return web.Response(body=f"{kind} of {request.query['filename']}".encode())
        content = await request.json() if request.can_read_body else {}
        return web.json_response(self._json(request.method, path, content))

    def _json(self, method: str, path: str, content: dict) -> object:
        if path == "system_stats":
            return {"system": {"comfyui_version": self.version}}
        if path == "object_info":
            return dict.fromkeys(self.nodes, {})
        if path == "prompt":
            return {"prompt_id": self._run(content["prompt"])}
        if path == "queue" and method == "GET":
            return {"queue_running": [[0, prompt_id] for prompt_id in self._queue], "queue_pending": []}
        if path == "interrupt":
            self._queue.remove(content["prompt_id"])
        if path.startswith("history/"):
            prompt_id = path.partition("/")[2]
            return {prompt_id: self._history[prompt_id]} if prompt_id in self._history else {}
        return {}

    def _run(self, prompt: dict) -> str:
        prompt_id = str(uuid.uuid4())
        picture = self._uploaded[prompt["1"]["inputs"]["image"]]
        self.pictures.append(picture)
        outputs = self.outputs(picture)
        if outputs is None:
            self._queue.append(prompt_id)
        elif isinstance(outputs, str):
            failure = {"node_type": "ImageInvert", "node_id": "2", "exception_message": outputs + "\n"}
            status = {"status_str": "error", "messages": [["execution_start", {}], ["execution_error", failure]]}
            self._history[prompt_id] = {"outputs": {}, "status": status}
        else:
            self._history[prompt_id] = {"outputs": {"3": outputs}, "status": {"status_str": "success"}}
        return prompt_id


def file_of(content: bytes) -> dict:
    """A file in the server's output, named after a picture."""
    return {"filename": content.decode(), "subfolder": "", "type": "temp"}


def pair_of(content: bytes) -> dict:
    """A pair in the server's output, named after a picture, with a mask and without a caption."""
    file = {"filename": content.decode(), "subfolder": "pix2pix_zero/pairs/x/edited", "type": "output"}
    return {**file, "mask": True, "caption": ""}
