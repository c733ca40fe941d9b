"""Folders and files on disk: how ComfyUI comes to know them, whether they have changed, and the download that a user ticks."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

import folder_paths

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
