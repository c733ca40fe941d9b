"""Servers, graphs and the demo of dev.py."""

import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from pix2pix_zero.devtools import cli, demo, process, server
from pix2pix_zero.devtools.environment import Environment
from pix2pix_zero.devtools.graphs import EDITS, PICTURES, Graph, demo_graph
from pix2pix_zero.devtools.hosts import ROOT, ComfyUI

posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def fake_comfyui(tmp_path: Path, main: str) -> Environment:
    tree = tmp_path / "comfyui"
    tree.mkdir()
    (tree / "main.py").write_text(main)
    environment = Environment(ComfyUI(tree, "0"), tmp_path / "venv")
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    return environment


def wait_until(condition, patience: float = 20.0) -> bool:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@posix_only
def test_a_server_that_fails_to_start_is_told_with_its_last_line(tmp_path):
    broken = fake_comfyui(tmp_path, "raise SystemExit('the disk is on fire')")
    with pytest.raises(process.DevError, match="ended while it started: the disk is on fire"), server.Server(broken):
        pass


@posix_only
@pytest.mark.parametrize("number", [2, 15, 9], ids=["ctrl-c", "sigterm", "killed"])
def test_no_server_outlives_dev_py(tmp_path, number):
    main = (
        "import os, pathlib, sys, http.server\n"
        "class Empty(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "port = int(sys.argv[sys.argv.index('--port') + 1])\n"
        "http.server.HTTPServer(('127.0.0.1', port), Empty).serve_forever()\n"
    )
    fake_comfyui(tmp_path, main)
    parent = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from devtools.environment import Environment; from devtools.hosts import ComfyUI\n"
        "from devtools.process import orderly_end; from devtools.server import Server\n"
        f"there = Environment(ComfyUI(Path({str(tmp_path / 'comfyui')!r}), '0'), Path({str(tmp_path / 'venv')!r}))\n"
        "with orderly_end(), Server(there, gpu=False) as server:\n"
        "    print('ready', flush=True); server.wait()\n"
    )
    temporary = {**os.environ, "TMPDIR": str(tmp_path)}  # killed, it cannot tidy up
    command = [sys.executable, "-c", parent]
    ours = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=temporary)
    try:
        assert ours.stdout.readline() == b"ready\n"
        pid = int((tmp_path / "pid").read_text())
        assert is_alive(pid)
        ours.send_signal(number)
        ours.wait(20)
        assert wait_until(lambda: not is_alive(pid))
    finally:
        ours.kill()
        ours.stdout.close()


def test_a_graph_takes_the_nodes_own_defaults_for_what_is_not_given():
    info = {
        "Blur": {
            "input": {"required": {"image": ["IMAGE"], "radius": ["INT", {"default": 3}], "kind": [["box", "disc"]]}}
        }
    }
    graph = Graph()
    first = graph.add("Blur", image=["0", 0], radius=9)
    graph.add("Blur", image=first[0])
    api = graph.api(info)
    assert api["1"]["inputs"] == {"image": ["0", 0], "radius": 9, "kind": "box"}
    assert api["2"]["inputs"] == {"image": ["1", 0], "radius": 3, "kind": "box"}


def test_a_graph_keeps_what_the_named_nodes_need():
    graph = Graph()
    first, other = graph.add("Draw"), graph.add("Draw")
    second = graph.add("Blur", image=first[0], radius=3)
    graph.add("Show", images=other[0])
    graph.keep(graph.add("Save", images=second[0], mask=first[1]))
    assert list(graph.api({name: {"input": {}} for name in ("Draw", "Blur", "Save")})) == ["1", "3", "5"]


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_every_demo_edit_changes_the_scene_it_starts_from(edit):
    assert {**edit.scene, **edit.edited_scene} != edit.scene
    assert edit.source != edit.target
    graph, shown, caption = demo_graph(edit, 1)
    assert {"source", "edited", "truth"} <= set(shown) and caption not in shown.values()


def picture(colour: str, size: tuple[int, int] = (128, 128)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def test_the_demo_saves_its_pictures_and_replaces_older_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "demo_output")
    for colour in ("red", "blue"):
        demo.save({key: picture(colour) for key in PICTURES})
    assert sorted(path.name for path in demo.OUTPUT.iterdir()) == ["comparison.png", "edited.png", "source.png"]
    assert Image.open(demo.OUTPUT / "edited.png").getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(process.DevError, match="Could not draw"):
        demo.save({key: b"no picture" for key in PICTURES})
    assert Image.open(demo.OUTPUT / "edited.png").getpixel((0, 0)) == (0, 0, 255)


def test_progress_is_told_by_the_nodes_own_names(capsys):
    report = demo.Report({"8": "Invert Picture"})
    for step in range(1, 51):
        report(server.Progress("8", step, 50))
    report(server.Progress(None, preview=b"..."))
    report.end()
    lines = capsys.readouterr().out.splitlines()
    assert "  Invert Picture 10/50" in lines and "  Invert Picture 50/50" in lines
    assert len(lines) <= 7, "a log is not flooded"
    assert "1 preview picture" in lines[-1]


@pytest.mark.parametrize("found", [True, False], ids=["a browser", "no browser"])
def test_serve_tells_the_address_and_opens_the_first_example_when_asked(monkeypatch, capsys, found):
    class Running(server.ForegroundServer):
        def __enter__(self):
            return self

        def wait(self):
            return 0

    opened = []
    here = Environment(ComfyUI(ROOT, "0"), Path(sys.prefix))
    monkeypatch.setattr(server, "ForegroundServer", Running)
    monkeypatch.setattr(cli, "prepare", lambda version: here)
    monkeypatch.setattr(cli.webbrowser, "open", lambda address: opened.append(address) or found)
    port = server.free_port()
    assert cli.main(["serve", "--port", str(port)]) == 0 and not opened
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out
    assert cli.main(["serve", "--port", str(port), "--open"]) == 0
    assert opened == [f"http://127.0.0.1:{port}/?template=cat_to_dog_demo&source={server.PACK_FOLDER}"]
    assert ("open the address above yourself" in capsys.readouterr().out) is not found


def test_a_port_in_use_is_told_before_anything_is_set_up(capsys, monkeypatch):
    monkeypatch.setattr(cli, "prepare", lambda version: pytest.fail("set up although the port is in use"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 1
    assert f"Port {port} is in use" in capsys.readouterr().err


def test_a_temporary_base_directory_goes_and_the_repository_stays():
    with server.base_directory() as base:
        assert (base / "custom_nodes" / "pix2pix-zero" / "__init__.py").samefile(ROOT / "__init__.py")
    assert not base.exists() and (ROOT / "__init__.py").exists()
