"""The pictures of a folder of ComfyUI's input, one at a time and always in the same order."""

import re
from pathlib import Path

import folder_paths
import numpy as np
import torch
from PIL import Image, ImageOps

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ITSELF = "(input itself)"


def folder_names() -> list[str]:
    """Where pictures may lie: the input folder itself, then the folders below it."""
    return [ITSELF, *folder_paths.get_input_subfolders()]


def picture_paths(folder: str) -> list[Path]:
    """The pictures of a folder below input, by name with numbers counted: 2.png comes before 10.png.

    Raises ValueError if the name leaves the input folder, there is no such folder or no picture in it.
    """
    if not isinstance(folder, str) or "\0" in folder:
        raise ValueError(f"folder: {folder!r} is not the name of a folder. Choose one from the list.")
    root = Path(folder_paths.get_input_directory())
    parts = () if folder == ITSELF else Path(folder.replace("\\", "/")).parts
    path = root.joinpath(*parts)
    if ".." in parts or not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"folder: {folder!r} is not inside ComfyUI's input folder. Choose one that is.")
    try:
        found = [item for item in path.iterdir() if item.suffix.lower() in ENDINGS and item.is_file()]
    except OSError as failure:
        raise ValueError(
            f"folder: {folder!r} cannot be read in ComfyUI's input folder ({failure.strerror})."
        ) from failure
    found = [item for item in found if not item.name.startswith(".")]
    if not found:
        raise ValueError(f"folder: there is no picture in {folder!r}. It takes {', '.join(ENDINGS)}.")
    return sorted(found, key=lambda item: (_counted(item.name), item.name))


def folder_picture(folder: str, index: int) -> tuple[torch.Tensor, str, int]:
    """(IMAGE [1, H, W, 3] as a camera held it, its file's name without the ending, number of pictures).

    Raises ValueError if there are fewer pictures, or this one cannot be read.
    """
    paths = picture_paths(folder)
    if not 0 <= index < len(paths):
        raise ValueError(
            f"index: {folder!r} has {len(paths)} pictures, numbered 0 to {len(paths) - 1}; all up to {index} are done. "
            "Set it back to 0 to begin again."
        )
    path = paths[index]
    try:
        image = _read(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as failure:
        raise ValueError(f"folder: {path.name} in {folder!r} cannot be read. Remove it or save it again.") from failure
    return image, path.stem, len(paths)


def _read(path: Path) -> torch.Tensor:
    with Image.open(path) as file:
        turned = ImageOps.exif_transpose(file)
        if turned.mode.startswith("I"):  # 16 bits a channel, which Pillow would cut off at 255
            turned = Image.fromarray((np.asarray(turned).astype(np.float32) / 257).round().astype(np.uint8))
        return torch.from_numpy(np.array(turned.convert("RGB"))).float().div(255)[None]


def folder_stamp(folder: str | None, index: int | None) -> str:
    """Changes when another picture comes to stand at this place, or this one changes.

    One for every folder that comes by a link and is not yet known, or cannot be read. A linked index is not known either:
    then all pictures count.
    """
    try:
        paths = picture_paths(folder)
        shown = paths[index : index + 1] if isinstance(index, int) else paths
        stats = [(str(path), path.stat()) for path in shown]
    except (OSError, ValueError):  # said when the node runs
        return str(folder)
    return " ".join([str(len(paths)), *(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)])


def _counted(name: str) -> list[tuple[int, int, str]]:
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name.lower()) if part
    ]
