"""What most tests of the host work on; a file that needs another model or CLIP has a fixture of its own."""

import shutil
from dataclasses import fields

import folder_paths
import pytest


@pytest.fixture(scope="module")
def shallow_unet():
    """`model` has few transformers, where their number does not matter. For `pytest.mark.usefixtures`, of a whole file."""
    from small_unet import SHALLOW, changed

    with changed(SHALLOW):
        yield


@pytest.fixture(scope="module")
def shallowest_unet():
    """`model` has transformers in its decoder alone, where they only have to be there. Used like `shallow_unet`."""
    from small_unet import SHALLOWEST, changed

    with changed(SHALLOWEST):
        yield


@pytest.fixture(scope="module")
def narrow_unet():
    """`model` has few channels, where their number does not matter. For `pytest.mark.usefixtures`, of a whole file."""
    from small_unet import NARROW, changed

    with changed(NARROW):
        yield


@pytest.fixture(scope="module")
def model():
    """A small UNet with random weights, loaded."""
    from small_unet import loaded_small_model

    return loaded_small_model()


@pytest.fixture(scope="module")
def clip():
    """A small CLIP with random weights."""
    from tiny_clip import tiny_clip

    return tiny_clip()


@pytest.fixture
def plain_direction():
    """An edit direction of random numbers, of no text encoder at hand."""
    import torch
    from pix2pix_zero.editing.directions import EditDirection

    tensors = {"cond": torch.randn(1, 77, 8), "pooled_output": torch.randn(1, 4)}
    return EditDirection(tensors, "SD1Model-0123-layer-1", "cat", "dog", 256, torch.randn(8))


@pytest.fixture(autouse=True)
def without_dead_models():
    """ComfyUI forgets the models of a test that has ended.

    It collects garbage whenever it loads a model while another one has no ModelPatcher any more, for seconds in all.
    """
    yield
    import comfy.model_management

    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [model for model in loaded if not model.is_dead()]


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    """A whole folder of a tiny BLIP."""
    from tiny_blip import make_blip_folder

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_blip_folder(folder)
    return folder


@pytest.fixture
def blip_models(blip_folder, tmp_path, monkeypatch):
    """models/blip in a temporary place, holding a whole folder `tiny`."""
    import folder_paths

    base = tmp_path / "blip"
    shutil.copytree(blip_folder, base / "tiny")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "blip", ([str(base)], {".safetensors"}))
    return base


@pytest.fixture(scope="module")
def tiny_captioner(blip_folder):
    import torch
    from pix2pix_zero.host.networks.captioner import load_captioner_folder

    with torch.inference_mode():
        return load_captioner_folder(blip_folder)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    """Tiny CLIP, DINO and LPIPS models."""
    from judge_figures import make_judges

    return make_judges(tmp_path_factory.mktemp("made"))


@pytest.fixture
def judge_models(judge_folder, tmp_path, monkeypatch):
    """models/pix2pix_zero/metrics and models/clip_vision in temporary places; the first holds a model of each kind."""
    import folder_paths
    from pix2pix_zero.host.networks.model_kinds import METRICS_FOLDER

    base = tmp_path / "metrics"
    shutil.copytree(judge_folder, base)
    for name, place in ((METRICS_FOLDER, base), ("clip_vision", tmp_path / "clip_vision")):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(place)], {".safetensors"}))
    return base


@pytest.fixture
def measure(run_node):
    """`measure(**inputs)`: (report, {figure: value}) as the executor calls a node that takes lists."""
    from pix2pix_zero.host.networks.edit_figures import EditFigures
    from pix2pix_zero.nodes.metrics import Pix2PixZeroEditMetrics

    figures = [field.name for field in fields(EditFigures)]

    def run(**inputs):
        lists = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
        report, *values = run_node(Pix2PixZeroEditMetrics, **lists)
        return report, dict(zip(figures, values, strict=True))

    return run


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """ComfyUI's folders in an empty place."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "upscale_models", ([str(tmp_path / "upscale")], {".safetensors"})
    )
    return tmp_path
