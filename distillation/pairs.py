"""A data set of pairs on disk: the pictures before and after an edit.

    FOLDER/source/KEY.png   the picture before the edit
    FOLDER/edited/KEY.png   after it
    FOLDER/mask/KEY.png     where it was edited, white; left out where that is everywhere
    FOLDER/edited/KEY.txt   what the edited picture shows, left out if unknown
    FOLDER/manifest.json    what all pairs have in common

`edited/KEY.png` is written last and each file by renaming, so a pair is either whole or not there.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..editing.inputs import interruptible
from ..editing.writing import clear_leftovers, write_whole
from .held_out import is_held_out

MANIFEST = "manifest.json"


class PairError(ValueError):
    """A data set that cannot be used, in the user's words."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of one size, in memory. `sources`, `edited`: uint8 [N, 3, H, W]; `areas`: uint8 [N, 1, H, W], 255 where edited."""

    keys: list[str]
    sources: Tensor
    edited: Tensor
    areas: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Pairs":
        """The same on another device."""
        return Pairs(self.keys, self.sources.to(device), self.edited.to(device), self.areas.to(device))

    def take(self, indices: Tensor | list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(sources [B, 3, H, W], edited [B, 3, H, W], areas [B, 1, H, W]) of some pairs, floats in 0..1."""
        chosen = torch.as_tensor(indices, device=self.sources.device)
        return tuple(data[chosen].float() / 255 for data in (self.sources, self.edited, self.areas))

    def split(self) -> tuple["Pairs", "Pairs"]:
        """(to train on, held out): a tenth by key, the same whatever else is in the set. Neither is empty."""
        held = [is_held_out(key) for key in self.keys]
        if all(held) or not any(held):
            held = [index == 0 for index in range(len(held))]
        return self.only([not flag for flag in held]), self.only(held)

    def only(self, flags: list[bool]) -> "Pairs":
        """Those whose flag is set."""
        indices = [index for index, flag in enumerate(flags) if flag]
        keys = [self.keys[index] for index in indices]
        return Pairs(keys, self.sources[indices], self.edited[indices], self.areas[indices])


def pair_key(source: Tensor, edited: Tensor) -> str:
    """A key for two pictures [H, W, 3] in 0..1: the same for the same pixels."""
    digest = hashlib.sha256()
    for picture in (source, edited):
        pixels = to_bytes(picture)
        digest.update(repr(pixels.shape).encode())
        digest.update(pixels.tobytes())
    return digest.hexdigest()[:32]


def to_bytes(picture: Tensor) -> np.ndarray:
    """A picture [H, W, 3] or a mask [H, W] in 0..1 as uint8. Raises PairError if it holds NaN or infinity."""
    if not picture.isfinite().all():
        raise PairError("the picture holds NaN or infinite values. Check the sampler and the VAE that drew it.")
    return (picture.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()


class PairFolder:
    """Reads and writes a data set. `shared`: what all pairs have in common, written to the manifest and compared with it."""

    def __init__(self, folder: str | os.PathLike, shared: dict[str, object] | None = None):
        self.folder = Path(folder)
        self.shared = shared

    def begin(self) -> None:
        """Create the folder. Raises PairError if its pairs have other things in common."""
        manifest = self.folder / MANIFEST
        for name in ("source", "edited", "mask"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.folder / name)
        if manifest.is_file():
            found = json.loads(manifest.read_text(encoding="utf-8"))
            different = sorted(name for name, value in (self.shared or {}).items() if found.get(name) != value)
            if different:
                raise PairError(
                    f"{self.folder}: its pairs were made with another {', '.join(different)}. Use another folder, or "
                    "delete this one."
                )
        elif self.shared is not None:
            write_whole(manifest, (json.dumps(self.shared, indent=1) + "\n").encode())

    def keys(self) -> list[str]:
        """The keys of all whole pairs, sorted."""
        before, after = (
            {path.stem for path in (self.folder / name).glob("*.png") if not path.name.startswith(".")}
            for name in ("source", "edited")
        )
        return sorted(before & after)

    def write(self, key: str, source: Tensor, edited: Tensor, area: Tensor | None = None, caption: str = "") -> None:
        """Add a pair, or write it anew. `source`, `edited`: [H, W, 3] in 0..1; `area`: [H, W], 1 where edited.

        Raises PairError if the pictures do not fit each other or hold NaN.
        """
        shapes = {tuple(item.shape[:2]) for item in (source, edited, area) if item is not None}
        if len(shapes) > 1:
            raise PairError(f"pair {key}: its pictures have unequal sizes, {_sizes(shapes)}. Make them of one size.")
        before, after, where = (
            None if item is None else _png(to_bytes(item)) for item in interruptible((source, edited, area))
        )
        mask = self.folder / "mask" / f"{key}.png"
        (self.folder / "edited" / f"{key}.png").unlink(missing_ok=True)
        write_whole(self.folder / "source" / f"{key}.png", before)
        if where is None:
            mask.unlink(missing_ok=True)
        else:
            write_whole(mask, where)
        if caption:
            write_whole(self.folder / "edited" / f"{key}.txt", (caption + "\n").encode())
        write_whole(self.folder / "edited" / f"{key}.png", after)

    def read(self, keys: Iterable[str] | None = None) -> Pairs:
        """Load pairs, all of them if no keys are given.

        Raises PairError: there is none, a file cannot be read, or not all are of one size; it names them.
        """
        keys = self.keys() if keys is None else list(keys)
        if not keys:
            raise PairError(f"{self.folder}: there are no pairs in it.")
        loaded = [self._read_one(key) for key in interruptible(keys)]
        shapes = {source.shape[:2] for source, _, _ in loaded}
        if len(shapes) > 1:
            raise PairError(f"{self.folder}: its pictures have unequal sizes, {_sizes(shapes)}. Make them of one size.")
        sources, edited, areas = (torch.from_numpy(np.stack(column)) for column in zip(*loaded))
        sources, edited = (pictures.movedim(-1, 1).contiguous() for pictures in (sources, edited))
        return Pairs(keys, sources, edited, areas[:, None])

    def _read_one(self, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        source, edited = (_read_png(self.folder / name / f"{key}.png", "RGB") for name in ("source", "edited"))
        path = self.folder / "mask" / f"{key}.png"
        area = _read_png(path, "L") if path.is_file() else np.full(source.shape[:2], 255, np.uint8)
        if len({item.shape[:2] for item in (source, edited, area)}) > 1:
            sizes = _sizes(item.shape[:2] for item in (source, edited, area))
            raise PairError(f"{self.folder}: pair {key} has unequal pictures, {sizes}. Delete it or make it again.")
        return source, edited, area


def _sizes(shapes: Iterable[tuple[int, ...]]) -> str:
    return " and ".join(sorted({f"{width}x{height}" for height, width in shapes}))


def _read_png(path: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert(mode))
    except (UnidentifiedImageError, OSError, SyntaxError) as failure:
        raise PairError(f"{path}: it cannot be read ({failure}). Delete this pair or make it again.") from failure


def _png(pixels: np.ndarray) -> bytes:
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG", compress_level=3)
    return png.getvalue()
