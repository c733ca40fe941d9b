"""Edit directions on disk: safetensors files with metadata under models/pix2pix_zero/directions. Pickles are not read."""

import hashlib
import logging
import os
import re
from pathlib import Path, PurePosixPath

import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ...editing.directions import EditDirection
from ...editing.writing import windows_refuses, write_numbered
from ..files import files_fingerprint, register_folder

FOLDER = "pix2pix_zero_directions"
FORMAT = "pix2pix_zero_direction"
# 2: with words that the edit adds, which earlier releases cannot apply. Other directions are still written as 1.
PLAIN_VERSION, VERSION = 1, 2
_TENSOR_PREFIX = "direction."
_ADDED = "added_words"
_CHECKSUM = "sha256"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def register_directions_folder() -> None:
    """Make models/pix2pix_zero/directions known to ComfyUI; folders from extra_model_paths.yaml are kept first."""
    register_folder(FOLDER, "pix2pix_zero", "directions")
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


def direction_names() -> list[str]:
    """The saved directions, as the Load node offers them."""
    return folder_paths.get_filename_list(FOLDER)


def save_direction(direction: EditDirection, filename_prefix: str) -> Path:
    """Write a direction beside the earlier ones of the same prefix, numbered as Save Image does; returns the new file.

    Raises ValueError naming the socket when the prefix is empty, unusable as a file name or leaves the folder, and when
    the file cannot be written; then nothing is left behind.
    """
    if direction.words_only:
        raise ValueError(
            "direction: it holds only the words to exchange, as texts of this model have no fixed length. There is nothing to "
            "save; make it anew with Edit Direction, which takes no time."
        )
    prefix = _inside(filename_prefix, "filename_prefix")
    for part in PurePosixPath(prefix).parts:
        if windows_refuses(part):
            raise ValueError(f'filename_prefix: Windows cannot make files called "{part}". Give another name.')
    root = Path(folder_paths.get_folder_paths(FOLDER)[0])
    made = [folder for folder in (root / prefix).parents if folder.is_relative_to(root) and not os.path.isdir(folder)]
    if (
        parent := (root / prefix).parent
    ).is_dir():  # newer hosts refuse what is behind a link, unless it is named itself
        root, prefix = parent.resolve(), PurePosixPath(prefix).name
    try:
        folder, name, counter, _, _ = _host_path(prefix, root)
        content = _as_bytes(direction)
        path = write_numbered(Path(folder), lambda number: f"{name}_{number:05}_.safetensors", content, counter)
    except (OSError, UnicodeError) as error:
        for folder in made:
            _remove_empty(folder)
        raise ValueError(
            f'filename_prefix: "{filename_prefix}" cannot be saved in {(root / prefix).parent}: '
            f"{getattr(error, 'strerror', None) or error}. Check the name, and that the folder can be written and the disk "
            "has room."
        ) from error
    logging.info("pix2pix-zero: saved the direction as %s", path)
    return path


def _host_path(prefix: str, root: Path) -> tuple[str, str, int, str, str]:
    try:
        return folder_paths.get_save_image_path(prefix, str(root))
    except Exception as error:
        if type(error) is not Exception:  # the host has no class of its own for a folder that it refuses
            raise
        raise OSError(str(error)) from error


def _as_bytes(direction: EditDirection) -> bytes:
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
        _CHECKSUM: _checksum(tensors),
    }
    return save(tensors, metadata)


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # it is not there, or somebody else has put something into it
        pass


def load_direction(direction_name: str) -> EditDirection:
    """Read a saved direction.

    Raises ValueError naming the socket when the name leaves the folder or the file is missing, corrupt, a pickle, no
    direction, or from a newer version of the pack.
    """
    path = direction_path(direction_name)
    try:
        with open(path, "rb") as file:
            # A safetensors file is the length of its header in 8 bytes, then the header, which is JSON.
            if file.read(9)[8:] != b"{":
                raise ValueError(
                    f'direction_name: "{direction_name}" is no safetensors file. If it is a pickle: pickles can run code '
                    "and are never read."
                )
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


def fingerprint(direction_name: str | None) -> str:
    """Changes when the file does, so that the graph's cache reads it again. One for every name that comes by a link."""
    try:
        return f"{direction_name} {files_fingerprint([Path(direction_path(direction_name))])}"
    except ValueError:  # said when the node runs
        return str(direction_name)


def _inside(name: str, socket: str) -> str:
    """The name with forward slashes. Raises ValueError unless it is a plain path below the folder."""
    if not isinstance(name, str):
        raise ValueError(f"{socket}: {name!r} is not a name. Connect a text.")
    parts = PurePosixPath(name.strip().replace("\\", "/"))
    if not parts.name:
        raise ValueError(f"{socket}: the name is empty.")
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f'{socket}: "{name}" leaves the directions folder. Give a name inside it.')
    if re.search(r'[<>:"|?*\x00-\x1f\ud800-\udfff]', name):
        raise ValueError(f"{socket}: {name!r} has characters that file names cannot have.")
    return str(parts)


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
    if metadata.get(_CHECKSUM) not in (None, _checksum(tensors)):
        raise ValueError(f'direction_name: "{direction_name}" is damaged: its checksum is another. Get it again.')
    first_token, added = tensors.pop("first_token", None), tensors.pop(_ADDED, None)
    outputs = {key.removeprefix(_TENSOR_PREFIX): tensor for key, tensor in tensors.items()}
    whole = (
        all(map(_is_one_row, outputs.values()))
        and outputs.get("cond", torch.empty(0)).ndim == 3
        and (first_token is None or _is_of_width(first_token, outputs["cond"]))
        and re.fullmatch("[0-9]{1,9}", metadata.get("count", ""))
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


def _is_of_numbers(tensor: torch.Tensor) -> bool:
    return tensor.dtype in _DTYPES and tensor.numel() > 0 and bool(tensor.isfinite().all())


def _is_one_row(tensor: torch.Tensor) -> bool:
    return tensor.ndim >= 2 and tensor.shape[0] == 1 and _is_of_numbers(tensor)


def _is_of_width(first_token: torch.Tensor, cond: torch.Tensor) -> bool:
    return first_token.shape == cond.shape[-1:] and _is_of_numbers(first_token)


def _are_words(added: torch.Tensor, cond: torch.Tensor) -> bool:
    """Whether these can be rows that `EditDirection.added` holds."""
    return added.ndim == 3 and added.shape[2] == cond.shape[2] and _is_one_row(added)
