"""Which BLIP folders are offered, read and refused."""

import json

import folder_paths
import pytest
import torch
from pix2pix_zero.host.networks import captioner, model_kinds
from pix2pix_zero.nodes.caption import Pix2PixZeroLoadCaptioner
from safetensors.torch import load_file, save_file
from tiny_blip import WORDS, in_the_hubs_cache, pictures


def test_loads_a_folder_of_models_blip(blip_models, tiny_captioner, run_node):
    (loaded,) = run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)
    images = pictures(2)
    assert loaded.caption(images) == tiny_captioner.caption(images)


def test_offers_the_demo_the_folders_and_the_well_known_models(blip_models):
    options = Pix2PixZeroLoadCaptioner.define_schema().inputs[0].options
    assert options == ["demo", "tiny", *model_kinds.BLIP.well_known]


def test_a_blip_folder_of_another_pack_is_kept(monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "blip", (["/elsewhere/blip"], {".pth"}))
    model_kinds.register_folders()
    model_kinds.register_folders()
    paths, extensions = folder_paths.folder_names_and_paths["blip"]
    assert len(paths) == 2 and paths[0] == "/elsewhere/blip"
    assert extensions == {".pth"}


@pytest.mark.parametrize("name", ["../tiny", "..", "", "tiny/..", "a/b", "/etc", "C:\\x", "..\\tiny"])
def test_refuses_names_that_leave_the_folder(blip_models, name, run_node):
    with pytest.raises(ValueError, match="^model_name: .*not the name of a model"):
        run_node(Pix2PixZeroLoadCaptioner, model_name=name, allow_download=False)


def test_says_what_to_put_where_if_the_folder_is_missing(blip_models, run_node):
    with pytest.raises(
        ValueError, match=r"^model_name: .*no BLIP captioning model 'mine'.*model\.safetensors"
    ) as error:
        run_node(Pix2PixZeroLoadCaptioner, model_name="mine", allow_download=True)
    assert str(blip_models / "mine") in str(error.value)
    assert str(error.value).endswith("On the blueprint model_name is called captioner.")


def test_lists_what_an_incomplete_folder_lacks(blip_models, run_node):
    for name in ("preprocessor_config.json", "tokenizer.json", "vocab.txt"):
        (blip_models / "tiny" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"Missing: preprocessor_config\.json, tokenizer\.json or vocab\.txt\."):
        run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)


def test_never_reads_a_pickle(blip_models, run_node):
    (blip_models / "tiny" / "model.safetensors").rename(blip_models / "tiny" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)


def as_transformers_5_writes_it(folder):
    """The settings of the image processor in the processor's file."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    (folder / "preprocessor_config.json").unlink()


def in_shards(folder):
    weights = sorted(load_file(folder / "model.safetensors").items())
    files = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, (key, _) in enumerate(weights)}
    for file in set(files.values()):
        save_file({key: tensor for key, tensor in weights if files[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("layout", [as_transformers_5_writes_it, in_shards, in_the_hubs_cache])
def test_loads_every_layout_in_which_transformers_writes_a_model(blip_models, tiny_captioner, layout, run_node):
    layout(blip_models / "tiny")
    assert "tiny" in Pix2PixZeroLoadCaptioner.define_schema().inputs[0].options
    (loaded,) = run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)
    images = pictures(2)
    assert loaded.caption(images) == tiny_captioner.caption(images)


def test_folders_that_hold_no_such_model_are_not_offered(blip_models):
    (blip_models / "empty").mkdir()
    (blip_models / "other").mkdir()
    (blip_models / "other" / "config.json").write_text('{"model_type": "clip"}')
    (blip_models / "cut off").mkdir()
    (blip_models / "cut off" / "model.safetensors").write_bytes(b"")
    options = Pix2PixZeroLoadCaptioner.define_schema().inputs[0].options
    assert options == ["demo", "cut off", "tiny", *model_kinds.BLIP.well_known]


def test_a_folder_that_cannot_be_read_counts_as_empty_and_is_named_once(tmp_path, monkeypatch, caplog):
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir()
    whole_listing = type(unreadable).iterdir

    def refuse(path):
        if path == unreadable:
            raise PermissionError(13, "Permission denied", str(path))
        return whole_listing(path)

    monkeypatch.setattr(type(unreadable), "iterdir", refuse)
    for name in ("blip", model_kinds.METRICS_FOLDER, "clip_vision"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(unreadable)], {".safetensors"}))
    for _ in range(2):
        for kind in (model_kinds.BLIP, model_kinds.CLIP, model_kinds.DINO):
            assert model_kinds.model_names(kind) == [kind.without, *kind.well_known]
        assert model_kinds.lpips_names() == ["none"]
    (warning,) = caplog.records
    assert str(unreadable) in warning.message and "Permission denied" in warning.message


DAMAGES = {
    "a list for a configuration": ("config.json", "[]"),
    "no heads": ("config.json", {"vision_config": {"num_attention_heads": 0}}),
    "no patches": ("config.json", {"vision_config": {"patch_size": 0}}),
    "half a layer": ("config.json", {"text_config": {"num_hidden_layers": 1.5}}),
    "layers without end": ("config.json", {"vision_config": {"num_hidden_layers": 3000}}),
    "words without end": ("config.json", {"text_config": {"vocab_size": 10**9}}),
    "a picture without end": ("config.json", {"vision_config": {"image_size": 10**6}}),
    "a configuration of text": ("config.json", {"vision_config": "small"}),
    "a cut off tokenizer": ("tokenizer.json", '{"model": '),
    "an empty tokenizer": ("tokenizer.json", "{}"),
    "cut off tokenizer settings": ("tokenizer_config.json", "{"),
    "a cut off preprocessor": ("preprocessor_config.json", "{"),
    "a list for a preprocessor": ("preprocessor_config.json", "[]"),
    "a mean of text": ("preprocessor_config.json", {"image_mean": "grey"}),
    "pictures without end": ("preprocessor_config.json", {"size": {"height": 10**6, "width": 10**6}}),
    "pictures of another size": ("preprocessor_config.json", {"size": {"height": 64, "width": 64}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_before_the_model_is_built(blip_models, damage, run_node):
    name, change = DAMAGES[damage]
    path = blip_models / "tiny" / name
    if isinstance(change, dict):
        settings = json.loads(path.read_text())
        for key, value in change.items():
            settings[key] = {**settings[key], **value} if isinstance(value, dict) and key in settings else value
        change = json.dumps(settings)
    path.write_text(change)
    with pytest.raises(ValueError, match="^model_name: ") as error:
        run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)
    assert name in str(error.value) and str(path.parent) in str(error.value)


def test_a_word_list_in_another_encoding_is_named(blip_models, run_node):
    folder = blip_models / "tiny"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_bytes("\n".join([*WORDS, "café"]).encode("cp1252"))
    with pytest.raises(ValueError, match=r"^model_name: the tokenizer in .*vocab\.txt"):
        run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)


@pytest.mark.parametrize("name", [3, None, 0.5])
def test_a_linked_name_that_is_no_text_is_refused_in_words(blip_models, name, run_node):
    with pytest.raises(ValueError, match="^model_name: .* is none of its choices"):
        run_node(Pix2PixZeroLoadCaptioner, model_name=name, allow_download=False)


@pytest.mark.parametrize("name", [None, "../x", "mine", ""])
def test_a_name_that_stands_for_no_folder_has_one_fingerprint(blip_models, name):
    prints = [Pix2PixZeroLoadCaptioner.fingerprint_inputs(name, None) for _ in range(2)]
    assert prints[0] == prints[1] and json.dumps(prints[0], allow_nan=False)


def test_says_that_a_download_was_cut_off(blip_models, run_node):
    weights = blip_models / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as safetensors.*get it again"):
        run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)


def test_refuses_another_kind_of_model(blip_models, run_node):
    config = blip_models / "tiny" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "clip"}))
    with pytest.raises(ValueError, match="^model_name: .*'clip', not 'blip'"):
        run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)
    config.write_text("{")
    with pytest.raises(ValueError, match="^model_name: .*not readable JSON"):
        run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)


KEY = "vision_model.post_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sd: sd.pop(KEY), r"1 missing \(vision_model"),
        (lambda sd: sd.update(extra=torch.zeros(1)), r"1 left over \(extra\)"),
        (lambda sd: sd.update({KEY: torch.zeros(3)}), "1 of another shape"),
    ],
)
def test_refuses_weights_that_do_not_fit(blip_models, change, words, run_node):
    weights = blip_models / "tiny" / "model.safetensors"
    state_dict = load_file(weights)
    change(state_dict)
    save_file(state_dict, weights)
    with pytest.raises(ValueError, match=words):
        run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)


def test_old_checkpoints_with_position_ids_load(blip_models, tiny_captioner):
    weights = blip_models / "tiny" / "model.safetensors"
    state_dict = load_file(weights)
    state_dict["text_decoder.bert.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(state_dict, weights)
    images = pictures(2)
    assert captioner.load_captioner("tiny").caption(images) == tiny_captioner.caption(images)


def test_a_changed_file_changes_the_fingerprint(blip_models):
    before = Pix2PixZeroLoadCaptioner.fingerprint_inputs("tiny", False)
    assert Pix2PixZeroLoadCaptioner.fingerprint_inputs("tiny", False) == before
    (blip_models / "tiny" / "config.json").write_text("{ }")
    assert Pix2PixZeroLoadCaptioner.fingerprint_inputs("tiny", False) != before
