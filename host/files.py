"""Folders and files on disk: how ComfyUI comes to know them, whether they have changed, and models in the layout of
Hugging Face transformers: reading them, and the download that a user ticks.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths
import safetensors
import torch

HASHED_BYTES = 1 << 24
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt")

logger = logging.getLogger(__name__)


def register_folder(folder_name: str, *parts: str) -> None:
    """Make a folder below `models` known to ComfyUI, after any of that name in extra_model_paths.yaml or another pack."""
    default = str(Path(folder_paths.models_dir, *parts))
    paths, _ = folder_paths.folder_names_and_paths.setdefault(folder_name, ([default], {".safetensors"}))
    if default not in paths:
        paths.append(default)


def children(folder: Path) -> list[Path]:
    """What lies in a folder, sorted. One that cannot be read counts as empty, with one warning that names it."""
    if not os.path.isdir(folder):  # Path.is_dir raises where a folder above it cannot be read
        return []
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        _warn_unreadable(folder, error.strerror)
        return []


@cache  # the lists are drawn up at every look of the browser
def _warn_unreadable(folder: Path, reason: str | None) -> None:
    logger.warning("The folder %s cannot be read (%s), so what lies in it is not offered.", folder, reason)


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


def is_plain_name(name: str) -> bool:
    """Whether it names something inside a folder, on every system."""
    # Checked as text and not resolved: a model folder that is a link to another disk is fine, "../x" is not.
    return name not in ("", ".", "..") and all(len(path(name).parts) == 1 for path in (PurePosixPath, PureWindowsPath))


def has_file(folder: Path, *names: str) -> bool:
    """Whether one of these files lies in the folder."""
    return any(os.path.isfile(folder / name) for name in names)


def snapshot(folder: Path) -> Path:
    """Where a model's files lie: the folder itself or, in one of the hub's cache, the snapshot of its main revision."""
    if has_file(folder, CONFIG) or not os.path.isdir(folder / "snapshots"):
        return folder
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        snapshots = [path for path in (folder / "snapshots").iterdir() if has_file(path, CONFIG)]
    except (OSError, ValueError):
        return folder
    return next((path for path in snapshots if path.name == revision), folder)


def read_json(path: Path, socket: str) -> dict:
    """The object in a JSON file. Raises ValueError, naming `socket` and the file, if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{socket}: {path} is not readable JSON: {error}. Get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{socket}: {path} is not readable JSON: it holds no object. Get it again.")
    return content


def read_image_processor(folder: Path, socket: str) -> tuple[dict, Path] | None:
    """The settings of a folder's image processor and their file, wherever transformers 4 or 5 wrote them."""
    if has_file(folder, PREPROCESSOR):
        return read_json(folder / PREPROCESSOR, socket), folder / PREPROCESSOR
    if has_file(folder, PROCESSOR):
        settings = read_json(folder / PROCESSOR, socket).get("image_processor")
        return (settings, folder / PROCESSOR) if isinstance(settings, dict) else None
    return None


def read_weights(path: Path, socket: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file whose key starts with `prefix`, without it, in float32.

    Raises ValueError, naming `socket`: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (the file itself is no iterable)
            return {key[len(prefix) :]: file.get_tensor(key).float() for key in keys}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{socket}: {path} cannot be read as safetensors: {error}. It is missing or its download was cut off: "
            "get it again."
        ) from error


def read_folder_weights(folder: Path, socket: str) -> dict[str, torch.Tensor]:
    """The tensors of a model folder, in one file or in shards, in float32. Raises ValueError as `read_weights`."""
    if has_file(folder, WEIGHTS):
        return read_weights(folder / WEIGHTS, socket)
    files = read_json(folder / SHARDS, socket).get("weight_map")
    names = set(files.values()) if isinstance(files, dict) and all(map(_is_shard, files.values())) else set()
    if not names:
        raise ValueError(f"{socket}: {folder / SHARDS} does not say which files hold the weights. Get it again.")
    return {key: tensor for name in sorted(names) for key, tensor in read_weights(folder / name, socket).items()}


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and is_plain_name(name) and name.endswith(".safetensors")


def download_model(repo_id: str, folder: Path, artefacts: Iterable[str]) -> None:
    """Fetch the files `artefacts` of `repo_id` from the Hugging Face hub into `folder`, nothing else.

    All come from one commit, and large files are compared with the SHA-256 that the hub names for them. Raises ValueError:
    nobody has agreed to downloads on this machine, or the download failed; a later run goes on where it stopped.
    """
    artefacts = list(artefacts)
    by_hand = f"put these files there by hand: {', '.join(artefacts)}."
    agreement = downloads_agreement()
    if not agreement.exists():
        raise ValueError(
            f"allow_download: nobody has agreed to downloads on this machine yet, and a workflow of somebody else's may come "
            f"with this tick. To fetch {repo_id} into {folder}, make an empty folder called {agreement} once, and run again. "
            f"Or {by_hand}"
        )
    try:
        _fetch(repo_id, folder, artefacts)
    except Exception as error:  # the hub's client has no common base class, and raises that of its HTTP library
        raise ValueError(
            f"allow_download: {repo_id} could not be downloaded to {folder}: {error}. Check the network and run again, "
            f"or {by_hand}"
        ) from error
    logger.info("%s is in %s", repo_id, folder)


def downloads_agreement() -> Path:
    """What a user makes once to agree to downloads on this machine. No workflow can make it."""
    return Path(folder_paths.get_user_directory()) / "pix2pix_zero_downloads_allowed"


def _fetch(repo_id: str, folder: Path, artefacts: list[str]) -> None:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repo_id, revision=_safetensors_revision(repo_id), files_metadata=True)
    logger.info("Downloading %s (commit %s) from the Hugging Face hub to %s", repo_id, info.sha, folder)
    snapshot_download(repo_id, revision=info.sha, local_dir=folder, allow_patterns=artefacts)
    for file in info.siblings:
        path = folder / file.rfilename
        if file.lfs is not None and file.rfilename in artefacts and file_sha256(path) != file.lfs.sha256:
            path.unlink()
            raise OSError(f"{file.rfilename} is not the file that the hub names, and has been removed")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASHED_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _safetensors_revision(repo_id: str) -> str:
    """The revision of `repo_id` that holds safetensors: main, else the hub's own automatic conversion.

    Raises FileNotFoundError: the repository offers its weights only as a pickle.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    if api.file_exists(repo_id, WEIGHTS):
        return "main"
    for discussion in api.get_repo_discussions(repo_id, author="SFconvertbot", discussion_type="pull_request"):
        revision = f"refs/pr/{discussion.num}"
        if discussion.status != "closed" and api.file_exists(repo_id, WEIGHTS, revision=revision):
            return revision
    raise FileNotFoundError(f"it offers no {WEIGHTS}, and other weights are never read")
