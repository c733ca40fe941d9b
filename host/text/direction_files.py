"""Edit directions on disk: safetensors files with metadata under models/pix2pix_zero/directions. Pickles are not read."""

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path, PurePosixPath

import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...editing.directions import EditDirection

FOLDER = "pix2pix_zero_directions"
FORMAT = "pix2pix_zero_direction"
# 2: with words that the edit adds, which earlier releases cannot apply. Other directions are still written as 1.
PLAIN_VERSION, VERSION = 1, 2
_STAMPED_BYTES = 1 << 24
_TENSOR_PREFIX = "direction."
_ADDED = "added_words"
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def register_directions_folder() -> None:
    """Make models/pix2pix_zero/directions known to ComfyUI; folders from extra_model_paths.yaml are kept first."""
    path = os.path.join(folder_paths.models_dir, "pix2pix_zero", "directions")
    paths, extensions = folder_paths.folder_names_and_paths.setdefault(FOLDER, ([], set()))
    if path not in paths:
        paths.append(path)
    extensions.add(".safetensors")


def direction_names() -> list[str]:
    """The saved directions, as the Load node offers them."""
    return folder_paths.get_filename_list(FOLDER)


def save_direction(direction: EditDirection, filename_prefix: str) -> Path:
    """Write a direction beside the earlier ones of the same prefix, numbered as Save Image does; returns the new file.

    Raises ValueError naming the socket when the prefix is empty, unusable as a file name or leaves the folder.
    """
    prefix = _inside(filename_prefix, "filename_prefix")
    root = folder_paths.get_folder_paths(FOLDER)[0]
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
    tensors = {_TENSOR_PREFIX + k: v.contiguous() for k, v in direction.tensors.items()}
    if direction.first_token is not None:
        tensors["first_token"] = direction.first_token.contiguous()
    if direction.added is not None:
        tensors[_ADDED] = direction.added.contiguous()
    metadata = {
        "format": FORMAT,
        "format_version": str(PLAIN_VERSION if direction.added is None else VERSION),
        "encoder": direction.encoder,
        "source": direction.source,
        "target": direction.target,
        "count": str(direction.count),
    }
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        path = _reserve(Path(folder), name, counter)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    logging.info("pix2pix-zero: saved the direction as %s", path)
    return path


def load_direction(direction_name: str) -> EditDirection:
    """Read a saved direction.

    Raises ValueError naming the socket when the name leaves the folder or the file is missing, corrupt, a pickle, no
    direction, or from a newer version of the pack.
    """
    path = direction_path(direction_name)
    with open(path, "rb") as file:
        if file.read(4).startswith(_PICKLE_STARTS):
            raise ValueError(
                f'direction_name: "{direction_name}" is a pickle. Pickles can run code and are never read.'
            )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(direction_name, metadata)
            # Clones: safetensors maps the file, which could not be replaced on Windows while it is mapped.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f'direction_name: "{direction_name}" is damaged and cannot be read ({error}).') from error
    return _from_file(direction_name, metadata, tensors)


def direction_path(direction_name: str) -> str:
    """The file of a saved direction. Raises ValueError when the name leaves the folder or there is no such file."""
    name = _inside(direction_name, "direction_name")
    if not name.endswith(".safetensors"):
        raise ValueError(f'direction_name: "{direction_name}" is not a .safetensors file. Only those are read.')
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(
            f'direction_name: there is no "{direction_name}" in models/pix2pix_zero/directions. '
            "Save a direction first or choose another."
        )
    return path


def file_stamp(direction_name: str) -> str:
    """Changes when the file does, so that the graph's cache reads it again. Times alone are too coarse."""
    path = Path(direction_path(direction_name))
    with path.open("rb") as file:
        content = hashlib.sha256(file.read(_STAMPED_BYTES)).hexdigest()
    return f"{direction_name} {path.stat().st_mtime_ns} {content}"


def _inside(name: str, socket: str) -> str:
    """The name with forward slashes. Raises ValueError unless it is a plain path below the folder."""
    parts = PurePosixPath(name.strip().replace("\\", "/"))
    if not parts.name:
        raise ValueError(f"{socket}: the name is empty.")
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f'{socket}: "{name}" leaves the directions folder. Give a name inside it.')
    if re.search(r'[<>:"|?*\x00-\x1f]', name):
        raise ValueError(f'{socket}: "{name}" has characters that file names cannot have.')
    return str(parts)


def _reserve(folder: Path, name: str, counter: int) -> Path:
    """A new empty file that no other save can take."""
    while True:
        path = folder / f"{name}_{counter:05}_.safetensors"
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            counter += 1


def _check_format(direction_name: str, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f'direction_name: "{direction_name}" is a safetensors file, but not an edit direction. '
            "Choose one that Save Direction wrote."
        )
    version = metadata.get("format_version", "")
    if version not in (str(PLAIN_VERSION), str(VERSION)):
        raise ValueError(
            f'direction_name: "{direction_name}" has format version {version}, this pack reads {VERSION}. Update the pack.'
        )


def _from_file(direction_name: str, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> EditDirection:
    first_token, added = tensors.pop("first_token", None), tensors.pop(_ADDED, None)
    outputs = {key.removeprefix(_TENSOR_PREFIX): tensor for key, tensor in tensors.items()}
    whole = (
        all(t.is_floating_point() and bool(t.isfinite().all()) for t in outputs.values())
        and outputs.get("cond", torch.empty(0)).ndim == 3
        and all(t.shape[0] == 1 for t in outputs.values())
        and (first_token is None or first_token.shape == outputs["cond"].shape[-1:])
        and metadata.get("count", "").isdigit()
        and (added is None or _are_words(added, outputs["cond"]))
    )
    if not whole:
        raise ValueError(f'direction_name: "{direction_name}" is damaged: its tensors are not those of a direction.')
    return EditDirection(
        tensors={name: tensor.float() for name, tensor in outputs.items()},
        encoder=metadata.get("encoder", ""),
        source=metadata.get("source", ""),
        target=metadata.get("target", ""),
        count=int(metadata["count"]),
        first_token=first_token,
        added=None if added is None else added.float(),
    )


def _are_words(added: torch.Tensor, cond: torch.Tensor) -> bool:
    """Whether these can be rows that `EditDirection.added` holds."""
    fits = added.ndim == 3 and added.shape[0] == 1 and added.shape[1] > 0 and added.shape[2] == cond.shape[2]
    return fits and added.is_floating_point() and bool(added.isfinite().all())
