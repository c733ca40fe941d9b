"""`dev.py demo`: the example on a real server, from nothing to pictures."""

import argparse
import io
import sys
import time

from PIL import Image

from ..pictures.charts import as_image, as_pillow
from ..pictures.strips import picture_strip
from .environment import running
from .graphs import EDITS, PICTURES, demo_graph
from .hosts import ROOT
from .process import DevError, one_thread, told
from .server import GraphError, Progress, Server

OUTPUT = ROOT / "demo_output"


def run_demo(name: str, seed: int) -> int:
    """Edit a demo scene and save source, edited and comparison pictures in `demo_output`."""
    started = time.monotonic()
    environment = running()
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
    save(pictures)
    print(f"Done in {time.monotonic() - started:.0f} s. Look at {(OUTPUT / 'comparison.png').relative_to(ROOT)}")
    return 0


def save(pictures: dict[str, bytes]) -> None:
    """Write source.png, edited.png and comparison.png, all of them or none."""
    try:
        images = [as_image(Image.open(io.BytesIO(pictures[key])))[None] for key in PICTURES]
    except OSError as error:
        raise DevError(f"Could not draw the comparison: {error}") from None
    OUTPUT.mkdir(exist_ok=True)
    as_pillow(picture_strip(images, list(PICTURES.values()))[0]).save(OUTPUT / "comparison.png")
    for key in ("source", "edited"):
        (OUTPUT / f"{key}.png").write_bytes(pictures[key])


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


def main() -> int:
    """Edit the scene that the arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--edit", choices=EDITS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    return run_demo(options.edit, options.seed)


if __name__ == "__main__":
    sys.exit(told(main))
