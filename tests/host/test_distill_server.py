"""An edit distilled on a real server, and its file in the stock nodes of a server that does not have this pack."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pix2pix_zero.devtools.graphs import Graph
from pix2pix_zero.devtools.server import GraphError

PAIRS = 50
FILE = "pix2pix_zero/inverted_00001.safetensors"


@contextlib.contextmanager
def without_the_pack():
    """While active, servers start without this pack."""
    from pix2pix_zero.devtools import server

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "link_folder", lambda link, target: None)
        yield


def pixels(png: bytes) -> torch.Tensor:
    """[1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB"))).float()[None] / 255


def learnt(steps: int = 20) -> Graph:
    """The pictures of a folder, each with its inverse, and a student of those pairs."""
    graph, saved = Graph(), None
    batch, edits = None, None
    for index in range(PAIRS):
        picture = graph.add("Pix2PixZeroFolderPicture", folder="scenes", index=index)[0]
        inverse = graph.add("ImageInvert", image=picture)[0]
        batch = picture if batch is None else graph.add("ImageBatch", image1=batch, image2=picture)[0]
        edits = inverse if edits is None else graph.add("ImageBatch", image1=edits, image2=inverse)[0]
    saved = graph.add("Pix2PixZeroSavePair", source=batch, edited=edits, dataset="inverted")
    student = graph.add("Pix2PixZeroDistill", dataset="inverted", name="inverted", steps=steps, seed=saved[0])
    graph.add("PreviewAny", source=student[2])
    graph.add("LossGraphNode", loss=student[3], filename_prefix="loss")
    return graph


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A ComfyUI base directory with a folder of pictures."""
    base = tmp_path_factory.mktemp("base")
    scenes = base / "input" / "scenes"
    scenes.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(PAIRS):
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))
        small.resize((32, 32)).save(scenes / f"{number}.png")
    return base


@pytest.fixture(scope="module")
def running(base, start_server):
    with start_server(keep=base) as server:
        yield server


def test_a_cancelled_training_says_so_and_the_next_run_goes_on_with_it(running, base):
    info, seen = running.object_info(), []

    def cancel(progress):
        seen.append(progress)
        if progress.preview:
            running.interrupt()

    with pytest.raises(GraphError, match="cancelled"):
        running.run(learnt(2000).api(info), cancel)
    assert any("Only 50 pairs" in progress.text and progress.text.endswith(" left") for progress in seen)
    (kept,) = (base / "output" / "pix2pix_zero" / "training").iterdir()
    assert not list((base / "models").rglob("*.safetensors"))
    graph = learnt()  # it has more steps behind it than this asks for, or the rest of them to go
    outputs = running.run(graph.api(info))
    assert not kept.exists()
    (curve,) = outputs[graph.only("LossGraphNode").key]["images"]
    blue = (pixels(running.view(curve))[0] - torch.tensor([0.0, 0.0, 1.0])).abs().amax(-1) < 0.01
    assert blue.any(0).sum() > 300  # Plot Loss Graph has drawn it from left to right


def test_every_picture_of_the_folder_is_a_pair(running, base):
    pairs = base / "output" / "pix2pix_zero" / "pairs" / "inverted"
    names = {kind: sorted(path.name for path in (pairs / kind).glob("*.png")) for kind in ("source", "edited")}
    assert len(names["source"]) == PAIRS and names["source"] == names["edited"]
    for name in names["source"][:5]:
        source, edited = (pixels((pairs / kind / name).read_bytes()) for kind in names)
        torch.testing.assert_close(edited, 1 - source, atol=0.6 / 255, rtol=0)


def test_a_picture_past_the_end_ends_the_run_in_words(running):
    graph = Graph()
    graph.add("PreviewImage", images=graph.add("Pix2PixZeroFolderPicture", folder="scenes", index=PAIRS)[0])
    with pytest.raises(GraphError, match="index: 'scenes' has 50 pictures"):
        running.run(graph.api(running.object_info()))


def test_the_student_runs_in_stock_nodes_on_a_server_without_the_pack(running, start_server, base, tmp_path):
    """Its pictures are those of the student's own call."""
    from pix2pix_zero.host.networks.students import load_student

    file = base / "models" / "upscale_models" / FILE
    bare = tmp_path / "bare"
    (bare / "models" / "upscale_models" / "pix2pix_zero").mkdir(parents=True)
    (bare / "models" / "upscale_models" / FILE).write_bytes(file.read_bytes())
    (bare / "input").mkdir()
    source = Image.open(base / "input" / "scenes" / "7.png").resize((44, 60))
    source.save(bare / "input" / "7.png")
    with without_the_pack(), start_server(keep=bare) as server:
        info = server.object_info()
        assert not [name for name in info if name.startswith("Pix2PixZero")]
        graph = Graph()
        model = graph.add("UpscaleModelLoader", model_name=FILE)
        picture = graph.add("LoadImage", image="7.png")
        edited = graph.add("ImageUpscaleWithModel", upscale_model=model[0], image=picture[0])
        shown = graph.add("PreviewImage", images=edited[0])
        outputs = server.run(graph.api(info))
        found = pixels(server.view(outputs[shown.key]["images"][0]))
    pictures = torch.from_numpy(np.array(source)).float()[None] / 255
    with torch.inference_mode():
        own = load_student(file)(pictures.movedim(-1, 1)).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(found, own, atol=1.1 / 255, rtol=0)
    assert (own - pictures).abs().mean() > 0.005


def test_the_file_says_what_it_was_made_of(base):
    from safetensors import safe_open

    with safe_open(base / "models" / "upscale_models" / FILE, "pt") as file:
        facts = file.metadata()
    assert facts["format"] == "pix2pix_zero.student" and facts["pairs"] == str(PAIRS)
    assert json.loads(facts["agreement"])["worst"] > 0
