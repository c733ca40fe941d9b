"""The caption nodes on tiny BLIP folders made on the spot."""

import importlib.util
import json
import logging
import sys

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from pix2pix_zero.host.networks import captioner, model_kinds
from pix2pix_zero.nodes.caption import Pix2PixZeroCaption, Pix2PixZeroLoadCaptioner
from safetensors.torch import load_file, save_file

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"a photo of the cat dog in on grass red big".split()]


def make_blip_folder(folder, seed=0):
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 32, "max_position_embeddings": 24, "pad_token_id": 0,
            "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "initializer_range": 1.0}  # fmt: skip
    config = BlipConfig(
        text_config={**small, **text},
        vision_config={**small, "image_size": 32, "patch_size": 8, "initializer_range": 1.0},
        initializer_range=1.0,
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    (folder / "vocab.txt").unlink()
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_blip_folder(folder)
    return folder


@pytest.fixture
def blip_models(whole_folder, tmp_path, monkeypatch):
    """models/blip in a temporary place, holding a whole folder `tiny`."""
    base = tmp_path / "blip"
    (base / "tiny").mkdir(parents=True)
    for path in whole_folder.iterdir():
        (base / "tiny" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "blip", ([str(base)], {".safetensors"}))
    return base


@pytest.fixture(scope="module")
def tiny(whole_folder):
    with torch.inference_mode():
        return captioner.load_captioner_folder(whole_folder)


def pictures(count, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 3, 3, generator=generator)
    return torch.nn.functional.interpolate(coarse, (40, 56), mode="bilinear").movedim(1, -1)


def reference_captions(folder, images, prefix=None):
    """The same captions by transformers alone, one picture at a time."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    blip = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    texts = []
    for image in images:
        picture = (image.numpy() * 255).round().astype(np.uint8)
        inputs = processor(images=picture, text=prefix, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        tokens = blip.generate(**inputs, max_new_tokens=12, num_beams=3, do_sample=False)
        texts.append(processor.decode(tokens[0][1:], skip_special_tokens=True).strip())
    return texts


def test_captions_each_picture_of_a_batch_as_transformers_does_alone(tiny, whole_folder, run_node):
    images = pictures(11)
    (captions,) = run_node(Pix2PixZeroCaption, captioner=tiny, image=images, max_new_tokens=12)
    assert captions == reference_captions(whole_folder, images)
    assert len(set(captions)) > 1


def test_prefix_conditions_the_caption_and_is_kept_once_as_typed(tiny, whole_folder, run_node):
    images = pictures(3)
    (captions,) = run_node(Pix2PixZeroCaption, captioner=tiny, image=images, prefix=" A photo  of ", max_new_tokens=12)
    expected = reference_captions(whole_folder, images, "a photo of")
    assert captions == ["A" + text.removeprefix("a") for text in expected]
    assert all(text.startswith("A photo of ") for text in captions)
    (unprefixed,) = run_node(Pix2PixZeroCaption, captioner=tiny, image=images, max_new_tokens=12)
    assert [text.removeprefix("A photo of ") for text in captions] != unprefixed


def test_alpha_is_left_out_and_one_channel_is_grey(tiny, run_node):
    images = pictures(2)
    (plain,) = run_node(Pix2PixZeroCaption, captioner=tiny, image=images)
    (with_alpha,) = run_node(Pix2PixZeroCaption, captioner=tiny, image=torch.cat([images, pictures(2, 1, 5)], dim=-1))
    assert with_alpha == plain
    grey = images[..., :1]
    (one_channel,) = run_node(Pix2PixZeroCaption, captioner=tiny, image=grey)
    (three_channels,) = run_node(Pix2PixZeroCaption, captioner=tiny, image=grey.repeat(1, 1, 1, 3))
    assert one_channel == three_channels


@pytest.mark.parametrize("image", [torch.zeros(4, 4, 3), torch.zeros(1, 4, 4, 5), torch.full((1, 4, 4, 3), torch.nan)])
def test_refuses_what_is_no_picture(tiny, image, run_node):
    with pytest.raises(ValueError, match="^image: "):
        run_node(Pix2PixZeroCaption, captioner=tiny, image=image)


@pytest.mark.parametrize("prefix", ["a " * 5000, "a \ud83d", None])
def test_refuses_a_prefix_that_is_no_text_of_use(tiny, prefix, run_node):
    with pytest.raises(ValueError, match="^prefix: "):
        run_node(Pix2PixZeroCaption, captioner=tiny, image=pictures(1), prefix=prefix)


def test_refuses_what_is_no_captioner(run_node):
    with pytest.raises(ValueError, match="^captioner: .*Connect Load Captioner"):
        run_node(Pix2PixZeroCaption, captioner=object(), image=pictures(1))


def test_refuses_a_prefix_that_leaves_no_room(tiny, run_node):
    with pytest.raises(ValueError, match="^prefix: .*Shorten"):
        run_node(Pix2PixZeroCaption, captioner=tiny, image=pictures(1), prefix="cat " * 30)


def test_long_captions_end_where_the_model_ends(tiny, run_node):
    (captions,) = run_node(
        Pix2PixZeroCaption, captioner=tiny, image=pictures(3), prefix="cat " * 20, max_new_tokens=200
    )
    assert all(len(text.split()) <= 24 for text in captions)


def test_the_model_is_loaded_by_the_hosts_memory_management(tiny, run_node):
    comfy.model_management.unload_all_models()
    run_node(Pix2PixZeroCaption, captioner=tiny, image=pictures(1))
    assert any(loaded.model is tiny.patcher for loaded in comfy.model_management.current_loaded_models)
    assert tiny.patcher.load_device == comfy.model_management.text_encoder_device()
    assert tiny.patcher.model_size() > 0


def test_the_host_unloads_the_model_whole(tiny, run_node):
    run_node(Pix2PixZeroCaption, captioner=tiny, image=pictures(1))
    (loaded,) = [entry for entry in comfy.model_management.current_loaded_models if entry.model is tiny.patcher]
    assert loaded.model_unload(memory_to_free=1) is True
    assert tiny.patcher.loaded_size() == 0
    comfy.model_management.current_loaded_models.remove(loaded)
    run_node(Pix2PixZeroCaption, captioner=tiny, image=pictures(1))


def test_cancel_stops_in_the_middle_of_a_caption_and_the_next_run_works(tiny, run_node, monkeypatch):
    images = pictures(2)
    (before,) = run_node(Pix2PixZeroCaption, captioner=tiny, image=images)
    steps = []

    def press_cancel(bar, value, *args, **kwargs):
        steps.append(value)
        if len(steps) == 2:
            comfy.model_management.interrupt_current_processing(True)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils.ProgressBar, "update_absolute", press_cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run_node(Pix2PixZeroCaption, captioner=tiny, image=images)
    assert len(steps) == 2
    (after,) = run_node(Pix2PixZeroCaption, captioner=tiny, image=images)
    assert after == before


def test_progress_ends_at_its_total(tiny, run_node, monkeypatch):
    seen = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda bar, value, *args: seen.append((value, bar.total))
    )
    run_node(Pix2PixZeroCaption, captioner=tiny, image=pictures(10), max_new_tokens=7)
    assert seen[-1] == (14, 14)
    assert [value for value, _ in seen] == sorted(value for value, _ in seen)


def test_loads_a_folder_of_models_blip(blip_models, tiny, run_node):
    (loaded,) = run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)
    images = pictures(2)
    assert loaded.caption(images) == tiny.caption(images)


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


def in_the_hubs_cache(folder):
    inside = folder / "snapshots" / "0123"
    inside.mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(inside / path.name)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")


@pytest.mark.parametrize("layout", [as_transformers_5_writes_it, in_shards, in_the_hubs_cache])
def test_loads_every_layout_in_which_transformers_writes_a_model(blip_models, tiny, layout, run_node):
    layout(blip_models / "tiny")
    assert "tiny" in Pix2PixZeroLoadCaptioner.define_schema().inputs[0].options
    (loaded,) = run_node(Pix2PixZeroLoadCaptioner, model_name="tiny", allow_download=False)
    images = pictures(2)
    assert loaded.caption(images) == tiny.caption(images)


def test_a_well_known_model_is_found_in_the_hubs_cache(blip_models, hub, run_node):
    folder = blip_models / f"models--{BASE.replace('/', '--')}"
    (blip_models / "tiny").rename(folder)
    in_the_hubs_cache(folder)
    run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    assert hub["calls"] == []


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
    with pytest.raises(ValueError, match="^model_name: .*is not the name of a model"):
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


def test_old_checkpoints_with_position_ids_load(blip_models, tiny):
    weights = blip_models / "tiny" / "model.safetensors"
    state_dict = load_file(weights)
    state_dict["text_decoder.bert.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(state_dict, weights)
    images = pictures(2)
    assert captioner.load_captioner("tiny").caption(images) == tiny.caption(images)


def test_a_changed_file_changes_the_fingerprint(blip_models):
    before = Pix2PixZeroLoadCaptioner.fingerprint_inputs("tiny", False)
    assert Pix2PixZeroLoadCaptioner.fingerprint_inputs("tiny", False) == before
    (blip_models / "tiny" / "config.json").write_text("{ }")
    assert Pix2PixZeroLoadCaptioner.fingerprint_inputs("tiny", False) != before


@pytest.fixture
def hub(monkeypatch, whole_folder):
    """A stand-in for the Hugging Face hub; `hub["revisions"]` are those that hold safetensors."""
    import huggingface_hub

    state = {"revisions": {"main"}, "calls": []}

    class Discussion:
        num, status = 37, "open"

    class Api:
        def file_exists(self, repo_id, filename, *, revision="main"):
            return filename == "model.safetensors" and revision in state["revisions"]

        def get_repo_discussions(self, repo_id, *, author, discussion_type):
            assert (author, discussion_type) == ("SFconvertbot", "pull_request")
            return iter([Discussion()])

    def snapshot_download(repo_id, *, revision, local_dir, allow_patterns):
        state["calls"].append((repo_id, revision, local_dir, allow_patterns))
        local_dir.mkdir(parents=True, exist_ok=True)
        for path in whole_folder.iterdir():
            (local_dir / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


BASE = model_kinds.BLIP.well_known[0]


def test_never_downloads_without_the_tick(blip_models, hub, run_node):
    with pytest.raises(ValueError, match="^model_name: .*tick allow_download") as error:
        run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=False)
    assert str(blip_models / "blip-image-captioning-base") in str(error.value)
    assert hub["calls"] == []


def test_downloads_safetensors_only_and_says_what_and_where_to(blip_models, hub, run_node, caplog):
    with caplog.at_level(logging.INFO):
        (loaded,) = run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    folder = blip_models / "blip-image-captioning-base"
    ((repo_id, revision, local_dir, patterns),) = hub["calls"]
    assert (repo_id, revision, local_dir) == (BASE, "main", folder)
    assert "model.safetensors" in patterns
    assert not [p for p in patterns if "*" in p or p.endswith((".bin", ".h5", ".py"))]
    assert f"Downloading {BASE}" in caplog.text and str(folder) in caplog.text
    assert len(loaded.caption(pictures(1))) == 1

    run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=False)
    assert len(hub["calls"]) == 1


def test_takes_the_hubs_own_conversion_if_main_holds_only_a_pickle(blip_models, hub, run_node):
    hub["revisions"] = {"refs/pr/37"}
    run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    assert hub["calls"][0][1] == "refs/pr/37"


def test_a_failed_download_names_the_folder_and_the_files(blip_models, hub, run_node):
    hub["revisions"] = set()
    with pytest.raises(ValueError, match=r"^allow_download: .*offers no model\.safetensors.*by hand: config\.json"):
        run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    assert hub["calls"] == []


@pytest.mark.parametrize("module", ["host.networks.model_kinds", "host.networks.captioner", "nodes.caption"])
def test_the_nodes_import_without_transformers_and_the_hub(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    spec = importlib.util.find_spec(f"pix2pix_zero.{module}")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
