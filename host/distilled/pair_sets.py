"""Data sets of pairs below ComfyUI's output folder: filled by Save Edit Pair, learnt by Distill Edit."""

from collections.abc import Sequence
from pathlib import Path

import folder_paths
import torch

from ...distillation.pairs import PairError, PairFolder, Pairs, pair_key
from ...editing.inputs import interruptible
from ..networks.edit_figures import EditedPicture, pair_pictures
from .names import plain_name

FEWEST = 50
FEW = 300  # fewer give a poor student
SMALLEST = 32  # pixels of a side
_SOCKETS = {"mask": "edited_area", "target_text": "caption"}


def pair_sets_folder() -> Path:
    """Where all data sets lie."""
    return Path(folder_paths.get_output_directory()) / "pix2pix_zero" / "pairs"


def pair_up(
    source: Sequence[torch.Tensor],
    edited: Sequence[torch.Tensor],
    edited_area: Sequence[torch.Tensor] = (),
    caption: Sequence[str] = (),
) -> list[EditedPicture]:
    """The pairs in lists of IMAGE batches, MASK batches and captions. Raises ValueError, naming the socket, if they differ."""
    try:
        return pair_pictures(source, edited, edited_area, (), caption)
    except ValueError as failure:
        socket, _, words = str(failure).partition(":")
        raise ValueError(f"{_SOCKETS.get(socket, socket)}:{words}") from failure


def save_pairs(dataset: str, pairs: Sequence[EditedPicture], keep_background: bool) -> tuple[int, list[dict]]:
    """Add pairs to a data set, each once however often it comes: (how many are in it, where each of these is).

    `keep_background`: outside the edited area the edited picture becomes the source. A place names the file of the edited
    picture as ComfyUI's /view takes it, with the pair's caption and whether it has a mask; `cluster` fetches them by it.
    Raises ValueError if the name cannot be one, or the disk refuses.
    """
    name = plain_name(dataset, "dataset")
    folder = PairFolder(pair_sets_folder() / name)
    places = []
    try:
        folder.begin()
        for pair in interruptible(pairs):
            source, edited, area = pair.source[0], pair.edited[0], None if pair.mask is None else pair.mask[0]
            if keep_background and area is not None:
                edited = torch.lerp(source, edited, area[..., None])
            key = pair_key(source, edited)
            folder.write(key, source, edited, area, pair.target_text)
            file = {"filename": f"{key}.png", "subfolder": f"pix2pix_zero/pairs/{name}/edited", "type": "output"}
            places.append({**file, "mask": area is not None, "caption": pair.target_text})
    except OSError as failure:
        raise ValueError(
            f"dataset: {folder.folder} cannot be written ({failure.strerror or failure}). Check that the disk has room."
        ) from failure
    return len(folder.keys()), places


def load_pairs(dataset: str) -> Pairs:
    """All pairs of a data set. Raises ValueError if there is none of that name, it is too small or pairs are damaged."""
    path = pair_sets_folder() / plain_name(dataset, "dataset")
    if not path.is_dir():
        names = sorted(item.name for item in pair_sets_folder().glob("*/") if item.is_dir())
        known = f"there are {', '.join(names)}" if names else "there is none yet"
        raise ValueError(f"dataset: there is no {dataset!r}; {known}. Make pairs with Save Edit Pair.")
    folder = PairFolder(path)
    keys = folder.keys()
    if len(keys) < FEWEST:
        raise ValueError(
            f"dataset: {dataset!r} has {len(keys)} pairs. At least {FEWEST} are needed, and {FEW} for an edit of colours. "
            "Save more with Save Edit Pair."
        )
    try:
        pairs = folder.read(keys)
    except PairError as failure:
        raise ValueError(f"dataset: {failure}") from failure
    height, width = pairs.sources.shape[-2:]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"dataset: its pictures are {width}x{height}. Make pairs of {SMALLEST} pixels and more a side."
        )
    return pairs
