"""``dev.py demo``: the example on a real server, from nothing to pictures."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .environment import Environment
from .graphs import EDITS, PICTURES, demo_graph
from .hosts import ROOT
from .process import DevError, one_thread
from .server import GraphError, Progress, Server

OUTPUT = ROOT / "demo_output"


def run_demo(environment: Environment, name: str, seed: int) -> int:
    """Edit a demo scene and save source, edited and comparison pictures in ``demo_output``."""
    started = time.monotonic()
    edit = EDITS[name]
    print(f"Starting ComfyUI {environment.comfyui.version} ...", flush=True)
    with Server(environment, options=["--disable-api-nodes"], variables=one_thread()) as server:
        print(f"ComfyUI runs on {server.url} after {time.monotonic() - started:.0f} s. Editing: {name}, seed {seed}")
        graph, shown, caption_node = demo_graph(edit, seed)
        try:
            object_info = server.object_info()
            api = graph.api(object_info)
        except KeyError as missing:
            raise DevError(f"The server has no node {missing}; did the pack load? (log: {server.log})") from None
        report = Report({key: object_info[node["class_type"]]["display_name"] for key, node in api.items()})
        try:
            outputs = server.run(api, report)
        except GraphError as error:
            raise DevError(f"The example failed: {error} (log: {server.log})") from None
        finally:
            report.end()
        print(f"Caption of the picture: {_text(outputs[caption_node])}")
        pictures = {key: server.view(outputs[node]["images"][0]) for key, node in shown.items()}
    save(environment, pictures)
    print(f"Done in {time.monotonic() - started:.0f} s. Look at {(OUTPUT / 'comparison.png').relative_to(ROOT)}")
    return 0


def save(environment: Environment, pictures: dict[str, bytes]) -> None:
    """Write source.png, edited.png and comparison.png, all of them or none."""
    with tempfile.TemporaryDirectory(prefix="demo-", dir=ROOT / ".comfyui") as folder:
        paths = {key: Path(folder) / f"{key}.png" for key in PICTURES}
        for key, path in paths.items():
            path.write_bytes(pictures[key])
        comparison = Path(folder) / "comparison.png"
        command = [environment.python, Path(__file__).with_name("comparison.py"), comparison]
        command += [f"{label}={paths[key]}" for key, label in PICTURES.items()]
        drawn = subprocess.run(command, capture_output=True, text=True, check=False)
        if drawn.returncode:
            raise DevError(f"Could not draw the comparison: {drawn.stderr.strip().splitlines()[-1]}")
        OUTPUT.mkdir(exist_ok=True)
        for path in (paths["source"], paths["edited"], comparison):
            shutil.move(path, OUTPUT / path.name)


def _text(output: dict) -> str:
    return " / ".join(str(part) for part in output.get("text", ()))


class Report:
    """Prints what the server is doing: one changing line on a terminal, a line per node and tenth elsewhere."""

    def __init__(self, titles: dict[str, str]) -> None:
        self._titles = titles
        self._terminal = sys.stdout.isatty()
        self._last = ""
        self._previews = 0
        self._phase = ""

    def __call__(self, progress: Progress) -> None:
        if progress.preview:
            self._previews += 1
            return
        if progress.text:
            self._phase = progress.text.splitlines()[0]
        title = self._titles.get(progress.node or "", progress.node)
        if not progress.maximum and not progress.text:
            self._phase = ""
        steps = f" {progress.value}/{progress.maximum}" if progress.maximum > 1 else ""
        line = f"{title}{steps}{'  ' + self._phase if self._phase else ''}"
        tenth = not progress.maximum or progress.value % max(1, progress.maximum // 5) == 0
        if line != self._last and (self._terminal or (tenth and not progress.text)):
            start, end = ("\r\x1b[K", "") if self._terminal else ("", "\n")
            print(f"{start}  {line}", end=end, flush=True)
            self._last = line

    def end(self) -> None:
        """Close the changing line."""
        if self._terminal and self._last:
            print("\r\x1b[K", end="")
        if self._previews:
            print(f"  {self._previews} preview pictures came while it ran.")
