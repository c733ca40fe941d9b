"""The models of the metrics node: which folders are offered, read, refused and fetched."""

import importlib.util
import json
import math
import sys

import comfy.model_management
import pytest
import torch
from judge_figures import pictures
from pix2pix_zero.host.networks import metric_models, model_kinds
from pix2pix_zero.nodes.metrics import Pix2PixZeroEditMetrics
from safetensors.torch import load_file, save_file
from tiny_judges import make_clip_folder, make_lpips_file


def test_offers_the_folders_that_fit_and_the_well_known_models(judge_models):
    (judge_models / "empty").mkdir()
    (judge_models / "unknown").mkdir()
    (judge_models / "unknown" / "pytorch_model.bin").touch()
    make_clip_folder(judge_models.parent / "clip_vision" / "borrowed")
    inputs = {item.id: item for item in Pix2PixZeroEditMetrics.define_schema().inputs}
    known = model_kinds.CLIP.well_known, model_kinds.DINO.well_known
    assert inputs["clip_model"].options == ["none", "borrowed", "clip", "unknown", *known[0]]
    assert inputs["dino_model"].options == ["none", "dino", "unknown", *known[1]]
    assert inputs["lpips_model"].options == ["none", "lpips.safetensors"]
    assert all(inputs[name].default == "none" for name in ("clip_model", "dino_model", "lpips_model"))


def test_reads_a_clip_folder_below_clip_vision(judge_models, measure):
    (judge_models / "clip").rename(judge_models.parent / "moved")
    (judge_models.parent / "clip_vision").mkdir()
    (judge_models.parent / "moved").rename(judge_models.parent / "clip_vision" / "clip")
    _, figures = measure(source=pictures(1), edited=pictures(1), target_text="a cat", clip_model="clip")
    assert not math.isnan(figures["clip_similarity"])


def test_the_models_are_in_the_hands_of_the_hosts_memory_management(judge_models):
    with torch.inference_mode():
        judge = metric_models.load_dino("dino")
        judge.keys(pictures(1))
        assert metric_models.vit_bytes(judge.network.config, (224, 480)) > metric_models.vit_bytes(judge.network.config)
    assert any(loaded.model is judge.patcher for loaded in comfy.model_management.current_loaded_models)
    assert {parameter.dtype for parameter in judge.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["../clip", "..", "a/b", "/etc", "C:\\x"])
@pytest.mark.parametrize("socket", ["clip_model", "dino_model", "lpips_model"])
def test_refuses_names_that_leave_the_folder(judge_models, measure, socket, name):
    with pytest.raises(ValueError, match=f"^{socket}: .*is not the name of a model"):
        measure(source=pictures(1), edited=pictures(1), **{socket: name})


def test_lists_what_a_folder_lacks_and_never_reads_a_pickle(judge_models, measure):
    options = {"source": pictures(1), "edited": pictures(1)}
    for name in ("preprocessor_config.json", "merges.txt"):
        (judge_models / "clip" / name).unlink()
    lacking = r"Missing: preprocessor_config\.json, tokenizer\.json or vocab\.json and merges\.txt\."
    with pytest.raises(ValueError, match=f"^clip_model: .*{lacking}"):
        measure(**options, clip_model="clip")
    (judge_models / "dino" / "model.safetensors").rename(judge_models / "dino" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^dino_model: .*pytorch_model\.bin, a pickle"):
        measure(**options, dino_model="dino")
    with pytest.raises(ValueError, match="^dino_model: there is no DINO .* 'mine'"):
        measure(**options, dino_model="mine")
    with pytest.raises(ValueError, match="^lpips_model: there is no file"):
        measure(**options, lpips_model="mine.safetensors")


def test_refuses_weights_that_do_not_fit(judge_models, measure):
    options = {"source": pictures(1), "edited": pictures(1)}
    weights = load_file(judge_models / "dino" / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, judge_models / "dino" / "model.safetensors")
    with pytest.raises(ValueError, match=r"^dino_model: the weights in .* 1 missing.*layernorm\.weight"):
        measure(**options, dino_model="dino")
    save_file({"x": torch.zeros(1)}, judge_models / "lpips.safetensors")
    with pytest.raises(ValueError, match="^lpips_model: .*does not hold the weights of LPIPS on SqueezeNet"):
        measure(**options, lpips_model="lpips.safetensors")
    (judge_models / "lpips.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="^lpips_model: .*cannot be read as safetensors"):
        measure(**options, lpips_model="lpips.safetensors")
    config = judge_models / "clip" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "blip"}))
    with pytest.raises(ValueError, match="^clip_model: .*of type 'blip', not 'clip'"):
        measure(**options, clip_model="clip")


def test_a_changed_file_changes_the_fingerprint(judge_models):
    chosen = {"clip_model": ["clip"], "dino_model": ["none"], "lpips_model": ["lpips.safetensors"]}
    before = Pix2PixZeroEditMetrics.fingerprint_inputs(**chosen)
    assert Pix2PixZeroEditMetrics.fingerprint_inputs(**chosen) == before
    make_lpips_file(judge_models / "lpips.safetensors", seed=1)
    assert Pix2PixZeroEditMetrics.fingerprint_inputs(**chosen) != before


def test_linked_names_have_one_fingerprint():
    chosen = {"clip_model": [None], "dino_model": [None], "lpips_model": [None]}
    prints = [Pix2PixZeroEditMetrics.fingerprint_inputs(**chosen) for _ in range(2)]
    assert prints[0] == prints[1] and "nan" not in prints[0].lower()


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("clip", "config.json"),
        ("clip", "tokenizer.json"),
        ("clip", "preprocessor_config.json"),
        ("dino", "config.json"),
    ],
)
def test_a_damaged_file_is_named(judge_models, measure, folder, file):
    (judge_models / folder / file).write_text("[]")
    with pytest.raises(ValueError, match=f"^{folder}_model: ") as error:
        measure(source=pictures(1), edited=pictures(1), target_text="a cat", **{f"{folder}_model": folder})
    assert file in str(error.value)


def test_a_model_that_is_not_pinned_is_not_downloaded(judge_models, measure):
    options = {"source": pictures(1), "edited": pictures(1), "dino_model": "facebook/dino-vitb8"}
    with pytest.raises(
        ValueError, match="^dino_model: there is no .* model.safetensors of one into the folder"
    ) as error:
        measure(**options)
    assert "allow_download" not in str(error.value)
    with pytest.raises(ValueError, match="^allow_download: facebook/dino-vitb8 is not fetched"):
        measure(**options, allow_download=True)


@pytest.mark.parametrize(
    "module",
    [
        "host.networks.model_kinds",
        "host.networks.metric_models",
        "host.networks.edit_figures",
        "host.networks.edit_report",
        "nodes.metrics",
    ],
)
def test_the_node_imports_without_transformers_and_the_hub(module, monkeypatch):
    for name in ("transformers", "huggingface_hub", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.find_spec(f"pix2pix_zero.{module}")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
