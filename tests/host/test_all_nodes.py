"""All nodes at once: schemas where no folder can be listed, and fingerprints of inputs that come by a link."""

import errno
import inspect
import os
import pathlib

import pytest
from comfy_api.latest import io
from pix2pix_zero.nodes import NODES

OWN_FINGERPRINT = [
    node for node in NODES if node.fingerprint_inputs.__func__ is not io.ComfyNode.fingerprint_inputs.__func__
]


def refuse(*args, **kwargs):
    raise OSError(errno.ESTALE, "Stale file handle")


def test_every_schema_is_made_where_no_folder_can_be_listed(monkeypatch):
    """As behind a mount that has gone: one node less would be the whole pack less."""
    for place, name in ((pathlib.Path, "iterdir"), (pathlib.Path, "glob"), (os, "listdir"), (os, "scandir")):
        monkeypatch.setattr(place, name, refuse)
    for node in NODES:
        assert node.define_schema().node_id == node.__name__


@pytest.mark.parametrize("node", OWN_FINGERPRINT, ids=lambda node: node.__name__)
@pytest.mark.parametrize("value", [None, "", "../gone", "gone.safetensors", "half\0"])
def test_a_fingerprint_never_raises_and_stays(node, value):
    """The host makes NaN of one that raises: it stands in the picture's metadata, and nothing after it is cached."""
    names = inspect.signature(node.fingerprint_inputs).parameters
    lists = node.GET_SCHEMA().is_input_list
    for given in ({name: value for name in names}, {"index": 0} if "index" in names else {}):
        inputs = {**dict.fromkeys(names), **given}
        if lists:
            inputs = {name: [item] for name, item in inputs.items()}
        prints = {node.fingerprint_inputs(**inputs) for _ in range(2)}
        assert len(prints) == 1 and isinstance(*prints, str)
