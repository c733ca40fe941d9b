"""Folders and files on disk: how ComfyUI comes to know them, whether they have changed, and the download that a user ticks."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import folder_paths

from .pinned import PINNED, Pin

HASHED_BYTES = 1 << 24
WEIGHTS = "model.safetensors"

logger = logging.getLogger(__name__)


def register_folder(folder_name: str, *parts: str) -> None:
    """Make a folder below `models` known to ComfyUI, after any of that name in extra_model_paths.yaml or another pack."""
    default = str(Path(folder_paths.models_dir, *parts))
    paths, _ = folder_paths.folder_names_and_paths.setdefault(folder_name, ([default], {".safetensors"}))
    if default not in paths:
        paths.append(default)


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Changes whenever the files change, so that ComfyUI reads them again; those that cannot be read are passed over."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            stat = path.stat()
            with path.open("rb") as file:
                content = hashlib.sha256(file.read(HASHED_BYTES)).hexdigest()  # times alone are too coarse
        except OSError:
            continue
        digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns, content)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def download_model(repo_id: str, folder: Path) -> None:
    """Fetch the files of `repo_id` that are pinned from the Hugging Face hub into `folder`, nothing else.

    Each comes from its commit, and one that is not what its pin says is removed. Raises ValueError: the model is not pinned,
    nobody has agreed to downloads on this machine, or the download failed; a later run goes on where it stopped.
    """
    pins = PINNED.get(repo_id)
    if pins is None:
        raise ValueError(
            f"allow_download: {repo_id} is not fetched, since no version of its {WEIGHTS} is known here to compare it with. "
            f"Put the files of one that you trust into {folder} by hand, or choose one of {', '.join(PINNED)}."
        )
    by_hand = f"put these files there by hand: {', '.join(pins)}."
    agreement = downloads_agreement()
    if not agreement.exists():
        raise ValueError(
            f"allow_download: nobody has agreed to downloads on this machine yet, and a workflow of somebody else's may come "
            f"with this tick. To fetch {repo_id} into {folder}, make an empty folder called {agreement} once, and run again. "
            f"Or {by_hand}"
        )
    try:
        _fetch(repo_id, folder, pins)
    except Exception as error:  # the hub's client has no common base class, and raises that of its HTTP library
        raise ValueError(
            f"allow_download: {repo_id} could not be downloaded to {folder}: {error}. Check the network and run again, "
            f"or {by_hand}"
        ) from error
    logger.info("%s is in %s", repo_id, folder)


def downloads_agreement() -> Path:
    """What a user makes once to agree to downloads on this machine. No workflow can make it."""
    return Path(folder_paths.get_user_directory()) / "pix2pix_zero_downloads_allowed"


def _fetch(repo_id: str, folder: Path, pins: Mapping[str, Pin]) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    told = {}  # what the hub names for files whose SHA-256 is not known here
    for commit in {pin.commit for pin in pins.values() if pin.sha256 is None}:
        info = HfApi().model_info(repo_id, revision=commit, files_metadata=True)
        if info.sha != commit:
            raise OSError(f"the hub gives commit {info.sha} for {commit}")
        told |= {file.rfilename: file for file in info.siblings}
    for name, pin in pins.items():
        path = folder / name
        logger.info(
            "Downloading %s of %s (commit %s) from the Hugging Face hub to %s", name, repo_id, pin.commit, folder
        )
        hf_hub_download(repo_id, name, revision=pin.commit, local_dir=folder)
        if not (file_sha256(path) == pin.sha256 if pin.sha256 else _is_what_the_hub_names(path, told.get(name))):
            path.unlink()
            raise OSError(f"{name} is not the file that it has to be, and has been removed")


def _is_what_the_hub_names(path: Path, file: Any) -> bool:
    """`file`: the hub's entry of it, with the SHA-256 of a large file or Git's own name of a small one's content."""
    if file is None:
        return False
    if file.lfs is not None:
        return file_sha256(path) == file.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASHED_BYTES):
            digest.update(piece)
    return digest.hexdigest()
