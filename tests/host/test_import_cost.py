"""What the pack costs when ComfyUI starts: it loads nothing heavy and reads no weights before a node runs."""

import json
import os
import subprocess
import sys

import pytest

LOAD = """
import asyncio, json, sys
from comfy.cli_args import args

args.cpu = True
import nodes

before, opened = set(sys.modules), []
sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)
import pix2pix_zero

node_list = asyncio.run(asyncio.run(pix2pix_zero.comfy_entrypoint()).get_node_list())
schemas = [node.GET_NODE_INFO_V1() for node in node_list]
print("RESULT" + json.dumps({"modules": sorted(set(sys.modules) - before), "opened": opened, "nodes": len(schemas)}))
"""


@pytest.fixture(scope="module")
def loaded() -> dict:
    """What loading the pack into a ComfyUI without other packs brings: the modules it adds, the files it opens."""
    import comfy

    comfyui = os.path.dirname(next(iter(comfy.__path__)))
    answer = subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=comfyui,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RESULT" in answer.stdout, answer.stderr
    return json.loads(answer.stdout.rpartition("RESULT")[2])


def test_loading_the_pack_imports_no_library_that_comfyui_has_not_imported(loaded):
    own = {name for name in loaded["modules"] if name.split(".")[0] == "pix2pix_zero"}
    foreign = {name.split(".")[0] for name in loaded["modules"]} - {"pix2pix_zero"}
    assert loaded["nodes"] > 15 and "pix2pix_zero.nodes.sampler" in own
    assert foreign <= set(sys.stdlib_module_names), foreign - set(sys.stdlib_module_names)


def test_the_demo_model_is_not_loaded_before_a_node_asks_for_it(loaded):
    loaders = {
        f"pix2pix_zero.{name}" for name in ("demo_model.loader", "demo_model.networks", "demo_model.autoencoder")
    }
    assert "pix2pix_zero.nodes.demo" in loaded["modules"]
    assert loaders.isdisjoint(loaded["modules"])
    assert [name for name in loaded["opened"] if name.endswith((".safetensors", ".txt", ".json"))] == []
