"""The pack on the real server, over its HTTP interface."""

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from pix2pix_zero.devtools.graphs import EDITS, PICTURES, Graph, demo_graph
from pix2pix_zero.devtools.hosts import ROOT
from pix2pix_zero.devtools.server import GraphError
from pix2pix_zero.nodes.sockets import CATEGORY


def pack_nodes(server) -> dict[str, dict]:
    return {name: schema for name, schema in server.object_info().items() if name.startswith("Pix2PixZero")}


def inputs_of(schema: dict) -> dict[str, list]:
    return {name: spec for group in ("required", "optional") for name, spec in schema["input"].get(group, {}).items()}


def test_the_server_lists_every_node_of_the_pack(server):
    import asyncio

    from pix2pix_zero.nodes import Pix2PixZeroExtension

    node_ids = {node.GET_SCHEMA().node_id for node in asyncio.run(Pix2PixZeroExtension().get_node_list())}
    assert node_ids
    assert node_ids == set(pack_nodes(server))


def test_every_node_is_in_the_packs_category_and_says_what_it_does(server):
    for name, schema in pack_nodes(server).items():
        assert schema["category"].split("/")[0] == CATEGORY, name
        assert len(schema["description"]) > 20, name
        assert not schema["display_name"].startswith("Pix2PixZero"), f"{name} needs a name in plain words"


def test_every_input_has_a_tooltip(server):
    silent = [
        f"{name}.{socket}"
        for name, schema in pack_nodes(server).items()
        for socket, spec in inputs_of(schema).items()
        if len((spec[1] if len(spec) > 1 else {}).get("tooltip", "")) < 10
    ]
    assert not silent


def test_the_readme_lists_every_node(server):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name, schema in pack_nodes(server).items() if schema["display_name"] not in readme] == []


def test_a_graph_runs_and_its_picture_comes_back(server):
    graph = Graph()
    picture = graph.add("EmptyImage", width=64, height=32)
    shown = graph.add("PreviewImage", images=picture[0])
    outputs = server.run(graph.api(server.object_info()))
    assert server.view(outputs[shown.key]["images"][0]).startswith(b"\x89PNG")


def test_a_graph_with_an_unknown_node_is_refused_by_name(server):
    with pytest.raises(GraphError, match="NoSuchNode"):
        server.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_the_demo_edits_use_only_scene_settings_that_exist(server):
    known = inputs_of(server.object_info("Pix2PixZeroDemoScene")["Pix2PixZeroDemoScene"])
    for edit in EDITS.values():
        for name, value in {**edit.scene, **edit.edited_scene}.items():
            assert value in known[name][1]["options"], (name, value)


def test_the_demo_shows_the_edit_between_the_source_and_the_true_answer(server):
    info = server.object_info()
    graph, shown, caption = demo_graph(EDITS["cat2dog"], seed=3)
    graph.change(graph.only("Pix2PixZeroInversion"), steps=4)  # the sampler takes as many
    outputs = server.run(graph.api(info))

    def picture(key: str) -> np.ndarray:
        png = server.view(outputs[shown[key]]["images"][0])
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float)

    def distance(one: str, other: str) -> float:
        return float(np.abs(pictures[one] - pictures[other]).mean())

    pictures = {key: picture(key) for key in PICTURES}
    assert {image.shape for image in pictures.values()} == {(128, 128, 3)}
    assert "".join(outputs[caption]["text"])
    assert distance("source", "truth") > 1
    # each column takes the picture nearer to the source
    drift = [distance("source", key) for key in ("direction", "guided", "held", "edited")]
    assert drift == sorted(drift, reverse=True)
    assert min(distance(one, other) for one, other in combinations(PICTURES, 2)) > 0.1, (
        "two columns are the same picture"
    )


def test_a_cancelled_graph_is_told_and_the_server_goes_on(server):
    info = server.object_info()
    graph, _, _ = demo_graph(EDITS["cat2dog"], seed=4)
    graph.change(graph.only("Pix2PixZeroInversion"), steps=500)
    seen = []

    def cancel_inside_the_inversion(progress):
        seen.append(progress)
        if progress.maximum > 400 and progress.value >= 2:
            server.interrupt()

    with pytest.raises(GraphError, match="cancelled"):
        server.run(graph.api(info), cancel_inside_the_inversion)
    assert max(progress.value for progress in seen) < 400
    picture = Graph()
    shown = picture.add("PreviewImage", images=picture.add("EmptyImage", width=8, height=8)[0])
    assert server.run(picture.api(info))[shown.key]["images"]
