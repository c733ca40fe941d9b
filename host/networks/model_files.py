"""Models in the layout of Hugging Face transformers: their folders, names, weights, and the download a user ticks."""

import logging
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths
import safetensors
import torch

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt")


def register_folder(folder_name: str, *parts: str) -> None:
    """Make a folder below `models` known to ComfyUI, beside any of that name in extra_model_paths.yaml or another pack."""
    default = str(Path(folder_paths.models_dir, *parts))
    paths, _ = folder_paths.folder_names_and_paths.setdefault(folder_name, ([default], {".safetensors"}))
    if default not in paths:
        paths.append(default)


def is_plain_name(name: str) -> bool:
    """Whether it names something inside a folder, on every system."""
    # Checked as text and not resolved: a model folder that is a link to another disk is fine, "../x" is not.
    return name not in ("", ".", "..") and all(len(path(name).parts) == 1 for path in (PurePosixPath, PureWindowsPath))


def fingerprint(paths: Iterable[Path]) -> str:
    """Changes whenever the files change, so that ComfyUI loads them again; those that do not exist are passed over."""
    stats = [(path.name, path.stat()) for path in paths if path.is_file()]
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def read_weights(path: Path, socket: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file whose key starts with `prefix`, without it, in float32.

    Raises:
        ValueError: naming `socket`, the file is missing or damaged.
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


def download_model(repo_id: str, folder: Path, artefacts: Iterable[str]) -> None:
    """Fetch the files `artefacts` of `repo_id` from the Hugging Face hub into `folder`, nothing else.

    Raises:
        ValueError: the download failed; a later run goes on where it stopped.
    """
    from huggingface_hub import snapshot_download

    artefacts = list(artefacts)
    try:
        revision = _safetensors_revision(repo_id)
        logger.info("Downloading %s (revision %s) from the Hugging Face hub to %s", repo_id, revision, folder)
        snapshot_download(repo_id, revision=revision, local_dir=folder, allow_patterns=artefacts)
    except Exception as error:  # the hub's client has no common base class, and raises that of its HTTP library
        raise ValueError(
            f"allow_download: {repo_id} could not be downloaded to {folder}: {error}. Check the network and run again, "
            f"or put these files there by hand: {', '.join(artefacts)}."
        ) from error
    logger.info("%s is in %s", repo_id, folder)


def _safetensors_revision(repo_id: str) -> str:
    """The revision of `repo_id` that holds safetensors: main, else the hub's own automatic conversion.

    Raises:
        FileNotFoundError: the repository offers its weights only as a pickle.
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
