"""What is fetched from the hub, and only when the user ticked that."""

import hashlib
import logging
from types import SimpleNamespace

import folder_paths
import pytest
from pix2pix_zero.host.networks import model_kinds
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
    """A stand-in for the Hugging Face hub; `hub["revisions"]` are those that hold safetensors.

    `hub["sha256"]`: what it says of the weights, None for what they are.
    """
    import huggingface_hub

    state = {"revisions": {"main"}, "calls": [], "sha256": None}
    weights = hashlib.sha256((blip_folder / "model.safetensors").read_bytes()).hexdigest()

    class Discussion:
        num, status = 37, "open"

    class Api:
        def file_exists(self, repo_id, filename, *, revision="main"):
            return filename == "model.safetensors" and revision in state["revisions"]

        def get_repo_discussions(self, repo_id, *, author, discussion_type):
            assert (author, discussion_type) == ("SFconvertbot", "pull_request")
            return iter([Discussion()])

        def model_info(self, repo_id, *, revision, files_metadata):
            assert files_metadata
            lfs = SimpleNamespace(sha256=state["sha256"] or weights)
            files = {"model.safetensors": lfs, "config.json": None, "pytorch_model.bin": SimpleNamespace(sha256="")}
            siblings = [SimpleNamespace(rfilename=name, lfs=lfs) for name, lfs in files.items()]
            return SimpleNamespace(sha=f"commit of {revision}", siblings=siblings)

    def snapshot_download(repo_id, *, revision, local_dir, allow_patterns):
        state["calls"].append((repo_id, revision, local_dir, allow_patterns))
        local_dir.mkdir(parents=True, exist_ok=True)
        for path in blip_folder.iterdir():
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


def test_the_tick_of_a_workflow_alone_downloads_nothing_until_the_user_has_agreed(
    blip_models, hub, user_folder, run_node
):
    with pytest.raises(ValueError, match="^allow_download: nobody has agreed to downloads on this machine") as error:
        run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    named = user_folder / "pix2pix_zero_downloads_allowed"
    assert f"called {named} once" in str(error.value) and hub["calls"] == []
    named.mkdir(parents=True)  # as it says
    run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    assert len(hub["calls"]) == 1


def test_a_file_that_is_not_the_hubs_is_removed(blip_models, agreed, hub, run_node):
    hub["sha256"] = "0" * 64
    with pytest.raises(ValueError, match=r"^allow_download: .*model\.safetensors is not the file that the hub names"):
        run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    assert not (blip_models / "blip-image-captioning-base" / "model.safetensors").exists()


def test_downloads_safetensors_only_and_says_what_and_where_to(blip_models, agreed, hub, run_node, caplog):
    with caplog.at_level(logging.INFO):
        (loaded,) = run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    folder = blip_models / "blip-image-captioning-base"
    ((repo_id, revision, local_dir, patterns),) = hub["calls"]
    assert (repo_id, revision, local_dir) == (BASE, "commit of main", folder)
    assert "model.safetensors" in patterns
    assert not [p for p in patterns if "*" in p or p.endswith((".bin", ".h5", ".py"))]
    assert f"Downloading {BASE}" in caplog.text and str(folder) in caplog.text
    assert len(loaded.caption(pictures(1))) == 1

    run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=False)
    assert len(hub["calls"]) == 1


def test_takes_the_hubs_own_conversion_if_main_holds_only_a_pickle(blip_models, agreed, hub, run_node):
    hub["revisions"] = {"refs/pr/37"}
    run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    assert hub["calls"][0][1] == "commit of refs/pr/37"


def test_a_failed_download_names_the_folder_and_the_files(blip_models, agreed, hub, run_node):
    hub["revisions"] = set()
    with pytest.raises(ValueError, match=r"^allow_download: .*offers no model\.safetensors.*by hand: config\.json"):
        run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    assert hub["calls"] == []


def test_a_well_known_model_is_found_in_the_hubs_cache(blip_models, hub, run_node):
    folder = blip_models / f"models--{BASE.replace('/', '--')}"
    (blip_models / "tiny").rename(folder)
    in_the_hubs_cache(folder)
    run_node(Pix2PixZeroLoadCaptioner, model_name=BASE, allow_download=True)
    assert hub["calls"] == []
