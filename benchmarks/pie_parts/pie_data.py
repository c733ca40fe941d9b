"""PIE-Bench as it is handed out: mapping_file.json beside a folder annotation_images (Ju et al., ICLR 2024, section 4)."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MAPPING = "mapping_file.json"
PICTURES = "annotation_images"
CATEGORIES = tuple("0123456789")


@dataclass(frozen=True)
class PieCase:
    """One edit of the benchmark. `blended_words`: the word that changes in the source and in the target text, or nothing."""

    key: str
    picture: Path
    name: str
    source_text: str
    target_text: str
    blended_words: tuple[str, ...]
    runs: tuple[int, ...]
    category: str

    def source(self) -> torch.Tensor:
        """The picture as [1, H, W, 3] in 0..1."""
        return read_picture(self.picture)

    def mask(self) -> torch.Tensor:
        """What is to change, as [1, H, W]."""
        with Image.open(self.picture) as image:
            width, height = image.size
        return torch.from_numpy(decode_mask(self.runs, height, width))[None]


def read_cases(data: Path, categories: tuple[str, ...] = CATEGORIES, limit: int = 0) -> list[PieCase]:
    """The edits of these categories, in the order of the mapping file, the first `limit` ones unless it is 0.

    Raises ValueError if the folder does not hold the benchmark, or has no edit of these categories.
    """
    mapping = data / MAPPING
    if not mapping.is_file() or not (data / PICTURES).is_dir():
        raise ValueError(f"--data: {data} is not PIE-Bench: it needs {MAPPING} and the folder {PICTURES}.")
    entries = json.loads(mapping.read_text(encoding="utf-8"))
    cases = [_case(data, key, entry) for key, entry in entries.items() if str(entry["editing_type_id"]) in categories]
    if not cases:
        raise ValueError(f"--category: {mapping} has no edit of category {', '.join(categories)}.")
    return cases[:limit] if limit else cases


def _case(data: Path, key: str, entry: dict) -> PieCase:
    try:
        return PieCase(
            key,
            data / PICTURES / entry["image_path"],
            entry["image_path"],
            _plain(entry["original_prompt"]),
            _plain(entry["editing_prompt"]),
            tuple(entry.get("blended_word", "").split()),
            tuple(entry["mask"]),
            str(entry["editing_type_id"]),
        )
    except KeyError as error:
        raise ValueError(f"--data: edit {key} of {MAPPING} has no {error}.") from error


def _plain(text: str) -> str:
    """A prompt without the brackets that mark what differs."""
    return " ".join(text.replace("[", "").replace("]", "").split())


def decode_mask(runs: tuple[int, ...], height: int, width: int) -> np.ndarray:
    """[height, width] of 0 and 1 from pairs (first pixel, number of pixels), counted row by row.

    The outermost pixels are always 1, as in the benchmark's own code, "to avoid annotation errors in boundary". Raises
    ValueError if the runs are not pairs or start outside the picture.
    """
    starts, lengths = runs[0::2], runs[1::2]
    if len(starts) != len(lengths) or any(not 0 <= start < height * width for start in starts):
        raise ValueError(f"--data: a mask of {MAPPING} does not fit its picture of {width}x{height}.")
    mask = np.zeros(height * width, dtype=np.float32)
    for start, length in zip(starts, lengths):
        mask[start : start + length] = 1
    mask = mask.reshape(height, width)
    mask[[0, -1], :] = 1
    mask[:, [0, -1]] = 1
    return mask


def read_picture(path: Path) -> torch.Tensor:
    """[1, H, W, 3] in 0..1."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).float()[None] / 255


def read_edit(path: Path, source: torch.Tensor) -> torch.Tensor:
    """An edited picture [1, H, W, 3] of the source's size; of a strip, as the benchmark's authors save, the last picture.

    Raises ValueError if it is not there or its size is another.
    """
    if not path.is_file():
        raise ValueError(f"{path}: this edited picture is missing.")
    height, width = source.shape[1:3]
    edited = read_picture(path)
    if edited.shape[2] > width:
        edited = edited[:, -height:, -width:]
    if edited.shape != source.shape:
        raise ValueError(f"{path}: it is {edited.shape[2]}x{edited.shape[1]}, its source {width}x{height}.")
    return edited


def write_picture(picture: torch.Tensor, path: Path) -> None:
    """Save [1, H, W, 3] in 0..1 as PNG, whatever the file is called: readers go by content, and JPEG would change it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (picture[0, ..., :3].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    Image.fromarray(pixels).save(path, format="PNG")
