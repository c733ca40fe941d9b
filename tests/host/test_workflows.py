"""The example workflows: what the files say, and what the real server makes of them."""

import io
import json
from itertools import combinations

import numpy as np
import pytest
from example_graphs import (
    ALONG_A_DIRECTION,
    API_COPIES,
    EXAMPLES,
    GRAPHS,
    LANGUAGE_MODEL,
    NAMES,
    YOUR_PICTURE,
    ids_of,
    only,
    quick,
    read,
    read_api,
    showing_the_source,
    titled,
    with_a_shipped_student,
    with_strength,
    without_strip,
)
from PIL import Image
from pix2pix_zero.devtools.hosts import ROOT
from pix2pix_zero.devtools.server import PACK_FOLDER, GraphError
from pix2pix_zero.host.networks.captioner import ON_THE_BLUEPRINT
from workflow_forms import NOTES, api_form

SUBGRAPHS = ROOT / "subgraphs"
TITLE_HEIGHT = 30


def box(node: dict) -> tuple[float, float, float, float]:
    """Left, top with the title bar, right, bottom."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


# --- the files ----------------------------------------------------------------------------------------------------


def test_every_example_has_its_thumbnail_and_its_api_copy():
    for folder, ending in ((EXAMPLES, "json"), (EXAMPLES, "jpg"), (API_COPIES, "json")):
        assert {path.stem for path in folder.glob(f"*.{ending}")} == {*NAMES, LANGUAGE_MODEL}


@pytest.mark.parametrize("name", NAMES)
def test_the_thumbnail_is_a_small_picture(name):
    path = EXAMPLES / f"{name}.jpg"
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        assert 256 <= picture.width <= 640
    assert path.stat().st_size < 60_000


@pytest.mark.parametrize("name", NAMES)
def test_links_join_what_the_nodes_say_they_join(name):
    workflow = read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link[1:] for link in workflow["links"]}
    used = set()
    for number, (origin, output, target, socket, kind) in links.items():
        assert number in nodes[origin]["outputs"][output]["links"]
        assert nodes[target]["inputs"][socket]["link"] == number
        assert nodes[origin]["outputs"][output]["type"] == kind
        used |= {origin, target}
    assert used == {key for key, node in nodes.items() if node["type"] not in NOTES}
    assert workflow["last_node_id"] == max(nodes)
    assert workflow["last_link_id"] == max(links)


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_reads_from_left_to_right_without_overlaps(name):
    workflow = read(name)
    boxes = {node["id"]: box(node) for node in workflow["nodes"]}
    for (a, first), (b, second) in combinations(boxes.items(), 2):
        apart = first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]
        assert apart, f"nodes {a} and {b} overlap"
    groups = [group["bounding"] for group in workflow["groups"]]
    for key, (left, top, right, bottom) in boxes.items():
        inside = [x <= left and y <= top and right <= x + w and bottom <= y + h for x, y, w, h in groups]
        assert sum(inside) == 1, f"node {key} is not inside one group"
    for _, origin, _, target, *_ in workflow["links"]:
        assert boxes[origin][0] <= boxes[target][0], f"the link from {origin} to {target} runs backwards"


@pytest.mark.parametrize("name", NAMES)
def test_seeds_stay_fixed_so_that_a_second_run_reuses_the_inversion(name, server):
    object_info = server.object_info()
    for node in read(name)["nodes"]:
        if "seed" in str(object_info.get(node["type"], {}).get("input_order")):
            assert "fixed" in node["widgets_values"], node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_the_api_copy_is_what_the_graph_says(name, server):
    assert without_titles(api_form(read(name), server.object_info())) == without_titles(read_api(name))


def without_titles(api):
    """ComfyUI renames its own nodes from version to version."""
    return {key: {part: value for part, value in node.items() if part != "_meta"} for key, node in api.items()}


# --- on the server ------------------------------------------------------------------------------------------------


def picture_of(server, outputs: dict, node: str) -> np.ndarray:
    """The one picture that a node showed, as (height, width, 3) in 0..255."""
    (entry,) = outputs[node]["images"]
    return np.asarray(Image.open(io.BytesIO(server.view(entry))).convert("RGB")).astype(np.float64)


@pytest.mark.parametrize("name", ALONG_A_DIRECTION)
def test_the_server_runs_the_example_and_its_direction_edits_the_picture(name, server):
    api = showing_the_source(without_strip(quick(GRAPHS[name](name))))
    (saved,) = ids_of(api, "SaveImage")
    outputs = server.run(api)
    source, edit = picture_of(server, outputs, "1000"), picture_of(server, outputs, saved)
    assert edit.shape == source.shape == (128, 128, 3)
    assert source.std() > 10  # NaN would come out as one flat colour
    assert edit.std() > 10
    assert np.abs(edit - source).mean() > 1
    unedited = picture_of(server, server.run(with_strength(api, 0.0)), saved)
    assert np.abs(edit - unedited).mean() > 0.5, "the direction does nothing"


@pytest.mark.parametrize("name", NAMES)
def test_the_server_runs_all_of_the_example_and_every_picture_in_it_differs(name, server):
    api = quick(GRAPHS[name](name), steps=1 if name == "distill_an_edit" else 2)
    outputs = server.run(api)
    pictures = [picture_of(server, outputs, key) for key in ids_of(api, "PreviewImage")]
    assert all(picture.std() > 10 for picture in pictures)
    assert all(
        one.shape != other.shape or np.abs(one - other).mean() > 0.05 for one, other in combinations(pictures, 2)
    )


def test_a_distilled_edit_makes_night_of_a_picture_and_of_every_frame_of_a_video(server):
    api = with_a_shipped_student(read_api("use_a_distilled_edit"))
    (picture,), (apply, frames) = ids_of(api, "SaveImage"), ids_of(api, "ImageUpscaleWithModel")
    for key, images in (("1002", api[apply]["inputs"]["image"]), ("1003", [frames, 0])):
        api[key] = {"class_type": "PreviewImage", "inputs": {"images": images}}
    outputs = server.run(api)
    day, night = (picture_of(server, outputs, key) for key in ("1002", picture))
    sky = slice(0, 20)
    assert day[sky].mean() - night[sky].mean() > 60
    kept = [
        np.asarray(Image.open(io.BytesIO(server.view(entry))).convert("RGB")) for entry in outputs["1003"]["images"]
    ]
    assert len(kept) == 3 and all(day[sky].mean() - frame[sky].mean() > 60 for frame in kept)


def test_the_stock_nodes_are_all_that_a_distilled_edit_needs():
    assert not [
        node["type"] for node in read("use_a_distilled_edit")["nodes"] if node["type"].startswith("Pix2PixZero")
    ]


def test_the_edit_stands_beside_its_source_with_a_word_under_each(server):
    api = showing_the_source(without_strip(quick(read_api("cat_to_dog_demo"))))
    (saved,) = ids_of(api, "SaveImage")
    outputs = server.run(api)
    strip = picture_of(server, outputs, titled(api, "Before and after"))
    # two squares of 256 pixels with 16 around each
    for left, key in ((16, "1000"), (288, saved)):
        picture = np.repeat(np.repeat(picture_of(server, outputs, key), 2, axis=0), 2, axis=1)
        assert np.abs(strip[16:272, left : left + 256] - picture).mean() < 4
        assert strip[272:, left : left + 256].min() < 100, "no word under the picture"


def test_without_an_edit_the_generated_picture_comes_back(server):
    api = showing_the_source(with_strength(quick(read_api("edit_a_generated_image")), 0.0))
    outputs = server.run(api)
    edit = picture_of(server, outputs, ids_of(api, "SaveImage")[0])
    assert np.abs(edit - picture_of(server, outputs, "1000")).max() <= 2


def test_without_an_edit_the_inverted_picture_comes_back(server):
    api = without_strip(with_strength(quick(read_api("cat_to_dog_demo")), 0.0))
    (encode,) = ids_of(api, "VAEEncode")
    vae = api[encode]["inputs"]["vae"]
    api["1001"] = {"class_type": "VAEDecode", "inputs": {"samples": [encode, 0], "vae": vae}}
    for key, picture in (("1002", ["1001", 0]), ("1003", only(api, "Pix2PixZeroPasteEdit")["inputs"]["edited"])):
        api[key] = {"class_type": "PreviewImage", "inputs": {"images": picture}}
    outputs = server.run(api)
    best = picture_of(server, outputs, "1002")
    assert np.abs(picture_of(server, outputs, "1003") - best).max() <= 2


def test_outside_the_edited_area_the_saved_picture_is_the_source(server):
    api = showing_the_source(without_strip(quick(read_api("cat_to_dog_demo"), steps=10)))
    outputs = server.run(api)
    source, edit = picture_of(server, outputs, "1000"), picture_of(server, outputs, ids_of(api, "SaveImage")[0])
    assert (source == edit).all(-1).mean() > 0.3
    assert np.abs(source - edit).mean() > 1


def test_no_method_keeps_more_than_the_perfect_edit_and_the_report_names_them(server):
    api = quick(read_api("compare_methods"))
    (told,) = ids_of(api, "PreviewAny")[1:]
    lines = server.run(api)[told]["text"][0].splitlines()
    psnr = {
        name: float(figures.split("PSNR ")[1].split(" ")[0])
        for name, figures in (
            line.split(": ", 1) for line in lines if "PSNR" in line and ": " in line and not line.startswith("Mean")
        )
    }
    assert list(psnr) == only(api, "Pix2PixZeroStrip")["inputs"]["labels"].splitlines()
    assert max(psnr, key=psnr.get) == "perfect edit"


@pytest.mark.parametrize("name", YOUR_PICTURE)
def test_your_picture_lacks_nothing_but_the_files_one_has_to_bring(name, server):
    api = read_api(name)
    with pytest.raises(GraphError) as refusal:
        server.run(api)
    lacking = {
        (node["class_type"], error["extra_info"]["input_name"])
        for node in refusal.value.details["node_errors"].values()
        for error in node["errors"]
    }
    assert lacking <= {("CheckpointLoaderSimple", "ckpt_name"), ("LoadImage", "image")}
    assert ("LoadImage", "image") in lacking


def test_the_template_browser_lists_the_examples_with_their_thumbnails(server):
    listed = json.loads(server.get("/workflow_templates"))
    assert set(listed[PACK_FOLDER]) == {*NAMES, LANGUAGE_MODEL}
    for name in NAMES:
        for ending in ("json", "jpg"):
            content = server.get(f"/api/workflow_templates/{PACK_FOLDER}/{name}.{ending}")
            assert content == (EXAMPLES / f"{name}.{ending}").read_bytes()


def test_the_blueprint_is_one_subgraph_and_the_server_offers_it(server):
    offered = {entry["name"]: key for key, entry in json.loads(server.get("/global_subgraphs")).items()}
    paths = sorted(SUBGRAPHS.glob("*.json"))
    assert [path.stem for path in paths] == ["Edit picture by concept"]
    for path in paths:
        entry = json.loads(server.get(f"/global_subgraphs/{offered[path.stem]}"))
        blueprint = json.loads(entry["data"])
        # the frontend shows an error to everybody at its start if these differ
        (node,), (subgraph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
        assert node["type"] == subgraph["id"]
        known = server.object_info()
        assert {inner["type"] for inner in subgraph["nodes"]} <= known.keys() | NOTES
        assert [(slot["name"], slot["type"]) for slot in subgraph["inputs"][:4]] == [
            ("model", "MODEL"),
            ("clip", "CLIP"),
            ("vae", "VAE"),
            ("image", "IMAGE"),
        ]
        assert [(slot["name"], slot["type"]) for slot in subgraph["outputs"]] == [("image", "IMAGE")]


def test_errors_name_what_the_blueprint_shows_under_another_name():
    (subgraph,) = json.loads((SUBGRAPHS / "Edit picture by concept.json").read_text())["definitions"]["subgraphs"]
    nodes, links = ({part["id"]: part for part in subgraph[kind]} for kind in ("nodes", "links"))
    other = set()
    for shown in subgraph["inputs"]:
        for link in map(links.get, shown["linkIds"]):
            node = nodes[link["target_id"]]
            socket = node["inputs"][link["target_slot"]]["name"]
            if socket != shown.get("label", shown["name"]):
                other.add((shown["name"], node["type"].removeprefix("Pix2PixZero"), socket))
    # Paste Edit gets the picture that Crop to Edit has checked by then, and called image.
    assert other == {("captioner", "LoadCaptioner", "model_name"), ("image", "PasteEdit", "source")}
    assert ON_THE_BLUEPRINT == "On the blueprint model_name is called captioner."


@pytest.mark.parametrize(("name", "side"), zip(YOUR_PICTURE, (512, 768, 1024)))
def test_your_picture_is_cut_to_the_size_of_its_checkpoint(name, side):
    assert only(read_api(name), "Pix2PixZeroCrop")["inputs"]["model_size"] == side


@pytest.mark.parametrize("name", [*YOUR_PICTURE, LANGUAGE_MODEL])
def test_your_picture_stands_at_the_values_of_the_walk_through(name):
    api = read_api(name)
    assert only(api, "Pix2PixZeroInversion")["inputs"]["steps"] == 50
    assert only(api, "Pix2PixZeroKSampler")["inputs"]["cfg"] == 5
    assert only(api, "Pix2PixZeroApplyDirection")["inputs"]["strength"] == 1
    assert not only(api, "Pix2PixZeroLoadCaptioner")["inputs"]["allow_download"]


@pytest.mark.parametrize("name", [*YOUR_PICTURE, LANGUAGE_MODEL])
def test_the_frontend_can_download_the_models_of_your_picture(name):
    folders = {"CheckpointLoaderSimple": "checkpoints", "CLIPLoader": "text_encoders"}
    loaders = [node for node in read(name)["nodes"] if node["type"] in folders]
    assert len(loaders) == 1 + (name == LANGUAGE_MODEL)
    for loader in loaders:
        (model,) = loader["properties"]["models"]
        assert model["name"] == loader["widgets_values"][0] and model["directory"] == folders[loader["type"]]
        assert model["url"].startswith("https://") and model["url"].endswith("/" + model["name"])
