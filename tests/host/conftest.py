"""The real ComfyUI server with the pack, started once for all tests that ask for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Iterator:
    """A running server: ``run(api_graph) -> outputs``, ``object_info()``, ``interrupt()``, ``get(path)``, ``view(image)``.

    ``run`` raises ``devtools.server.GraphError`` in the server's own words. See also ``devtools.graphs.Graph``.
    """
    import comfy
    from comfyui_version import __version__
    from pix2pix_zero.devtools.environment import Environment
    from pix2pix_zero.devtools.hosts import ROOT, ComfyUI
    from pix2pix_zero.devtools.process import one_thread
    from pix2pix_zero.devtools.server import Server

    path = Path(next(iter(comfy.__path__))).parent
    comfyui = ComfyUI(path, __version__, own=not path.is_relative_to(ROOT))
    environment = Environment(comfyui, Path(sys.prefix))
    offline = pytest.MonkeyPatch()
    offline.setenv("HF_HUB_OFFLINE", "1")  # nothing may be downloaded by a test
    try:
        gpu = None if pytestconfig.getoption("--gpu") else False
        with Server(environment, options=["--disable-api-nodes"], gpu=gpu, variables=one_thread()) as running:
            yield running
    finally:
        offline.undo()
