"""What is fetched from the hub, and only when the user ticked that."""

import hashlib
import logging
import re
from types import SimpleNamespace

import folder_paths
import pytest
from pix2pix_zero.host.networks import model_kinds
from pix2pix_zero.host.pinned import PINNED, Pin
from pix2pix_zero.nodes.caption import Pix2PixZeroLoadCaptioner
from tiny_blip import in_the_hubs_cache, pictures


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    return tmp_path / "user"


@pytest.fixture
def agreed(user_folder):
    (user_folder / "pix2pix_zero_downloads_allowed").mkdir(parents=True)


@pytest.fixture
def hub(monkeypatch, blip_folder):
    """A stand-in for the Hugging Face hub, which serves the tiny BLIP folder at every commit.

    `hub["lies"]`: files of which it gives another content than it names.
    """
    import huggingface_hub

    state = {"calls": [], "lies": set(), "sha": None}

    def entry(path):
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if path.suffix == ".safetensors" else None
        return SimpleNamespace(rfilename=path.name, lfs=lfs, blob_id=blob)

    class Api:
        def model_info(self, repo_id, *, revision, files_metadata):
            assert files_metadata
            files = [entry(path) for path in blip_folder.iterdir()]
            return SimpleNamespace(sha=state["sha"] or revision, siblings=files)

    def hf_hub_download(repo_id, filename, *, revision, local_dir):
        state["calls"].append((repo_id, filename, revision, local_dir))
        local_dir.mkdir(parents=True, exist_ok=True)
        lie = b" " if filename in state["lies"] else b""
        (local_dir / filename).write_bytes((blip_folder / filename).read_bytes() + lie)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    files = [path.name for path in blip_folder.iterdir()]
    monkeypatch.setitem(PINNED, LARGE, {name: Pin("c" * 40, None) for name in files})
    return state


BASE, LARGE = model_kinds.BLIP.well_known


def test_never_downloads_without_the_tick(blip_models, hub, run_node):
    with pytest.raises(ValueError, match="^model_name: .*tick allow_download") as error:
        run_node(Pix2PixZeroLoadCaptioner, model_name=LARGE, allow_download=False)
    assert str(blip_models / "blip-image-captioning-large") in str(error.value)
    assert hub["calls"] == []


def test_the_tick_of_a_workflow_alone_downloads_nothing_until_the_user_has_agreed(
    blip_models, hub, user_folder, run_node
):
    with pytest.raises(ValueError, match="^allow_download: nobody has agreed to downloads on this machine") as error:
        run_node(Pix2PixZeroLoadCaptioner, model_name=LARGE, allow_download=True)
    named = user_folder / "pix2pix_zero_downloads_allowed"
    assert f"called {named} once" in str(error.value) and hub["calls"] == []
    named.mkdir(parents=True)  # as it says
    run_node(Pix2PixZeroLoadCaptioner, model_name=LARGE, allow_download=True)
    assert hub["calls"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_that_is_not_what_it_has_to_be_is_removed(blip_models, agreed, hub, run_node, file):
    hub["lies"] = {file}
    with pytest.raises(ValueError, match=f"^allow_download: .*{file} is not the file that it has to be"):
        run_node(Pix2PixZeroLoadCaptioner, model_name=LARGE, allow_download=True)
    assert not (blip_models / "blip-image-captioning-large" / file).exists()


def test_a_sha256_that_is_known_here_counts_more_than_what_the_hub_names(
    blip_models, agreed, hub, run_node, blip_folder, monkeypatch
):
    files = [path.name for path in blip_folder.iterdir()]
    known = {name: hashlib.sha256((blip_folder / name).read_bytes()).hexdigest() for name in files}
    monkeypatch.setitem(PINNED, LARGE, {name: Pin("c" * 40, known[name]) for name in files})
    run_node(Pix2PixZeroLoadCaptioner, model_name=LARGE, allow_download=True)
    (blip_models / "blip-image-captioning-large" / "config.json").unlink()
    monkeypatch.setitem(PINNED, LARGE, {name: Pin("c" * 40, "0" * 64) for name in files})
    with pytest.raises(ValueError, match="is not the file that it has to be"):
        run_node(Pix2PixZeroLoadCaptioner, model_name=LARGE, allow_download=True)


def test_another_commit_than_the_pinned_one_is_refused(blip_models, agreed, hub, run_node):
    hub["sha"] = "d" * 40
    with pytest.raises(ValueError, match="^allow_download: .*the hub gives commit d{40} for c{40}"):
        run_node(Pix2PixZeroLoadCaptioner, model_name=LARGE, allow_download=True)
    assert hub["calls"] == []


def test_downloads_what_is_pinned_and_says_what_and_where_to(blip_models, agreed, hub, run_node, caplog):
    with caplog.at_level(logging.INFO):
        (loaded,) = run_node(Pix2PixZeroLoadCaptioner, model_name=LARGE, allow_download=True)
    folder = blip_models / "blip-image-captioning-large"
    assert {(call[0], call[2]) for call in hub["calls"]} == {(LARGE, "c" * 40)} and {
        call[3] for call in hub["calls"]
    } == {folder}
    assert f"of {LARGE} (commit cccc" in caplog.text and str(folder) in caplog.text
    assert len(loaded.caption(pictures(1))) == 1

    count = len(hub["calls"])
    run_node(Pix2PixZeroLoadCaptioner, model_name=LARGE, allow_download=True)
    run_node(Pix2PixZeroLoadCaptioner, model_name=LARGE, allow_download=False)
    assert len(hub["calls"]) == count


def test_what_is_not_pinned_is_never_fetched(blip_models, agreed, hub, run_node):
    with pytest.raises(ValueError, match=f"^allow_download: {BASE} is not fetched.*choose one of {LARGE}"):
        run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    assert hub["calls"] == []


@pytest.mark.parametrize("repo_id", PINNED)
def test_every_pin_is_a_whole_commit_and_never_a_pickle(repo_id):
    (kind,) = [kind for kind in (model_kinds.BLIP, model_kinds.CLIP, model_kinds.DINO) if repo_id in kind.well_known]
    files = PINNED[repo_id]
    assert all(re.fullmatch("[0-9a-f]{40}", pin.commit) for pin in files.values())
    assert all(pin.sha256 is None or re.fullmatch("[0-9a-f]{64}", pin.sha256) for pin in files.values())
    assert all(name.endswith((".json", ".txt", ".safetensors")) for name in files)
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
    assert {name for names in kind.vocabularies for name in names} <= set(files)


def test_a_well_known_model_is_found_in_the_hubs_cache(blip_models, hub, run_node):
    folder = blip_models / f"models--{LARGE.replace('/', '--')}"
    (blip_models / "tiny").rename(folder)
    in_the_hubs_cache(folder)
    run_node(Pix2PixZeroLoadCaptioner, model_name=LARGE, allow_download=True)
    assert hub["calls"] == []
