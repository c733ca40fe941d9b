"""Folders of models and files: how ComfyUI comes to know them, what lies in them, and whether it has changed."""

import hashlib
import logging
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import folder_paths

HASHED_BYTES = 1 << 24

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


def fingerprint(paths: Iterable[Path]) -> str:
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
