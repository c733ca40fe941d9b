"""Small pictures, an edit that is learnt, and data sets of both."""

import numpy as np
import torch
from PIL import Image
from pix2pix_zero.nodes.pairs import Pix2PixZeroSavePair

SIDE = 32


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    """IMAGE [1, H, W, 3] of whole bytes, smooth enough to be learnt."""
    noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")
    return (smooth.movedim(1, -1) * 255).round() / 255


def swapped(image: torch.Tensor) -> torch.Tensor:
    """The edit that is learnt: red and blue change places."""
    return image.flip(-1)


def save(run_node, source, edited, **inputs) -> int:
    """As the executor calls a node over lists."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
    return run_node(Pix2PixZeroSavePair, source=[source], edited=[edited], dataset=["swap"], **lists)[0]


def fill(run_node, count: int = 50) -> None:
    """A data set that can be trained on."""
    sources = torch.cat([picture(seed) for seed in range(count)])
    assert save(run_node, sources, swapped(sources)) == count


def names(folder, kind: str) -> list[str]:
    """The files of one kind in the data set."""
    return sorted(path.name for path in (folder / "output" / "pix2pix_zero" / "pairs" / "swap" / kind).iterdir())


def pixels(path) -> torch.Tensor:
    """A file as IMAGE [1, H, W, 3]."""
    with Image.open(path) as file:
        return torch.from_numpy(np.array(file.convert("RGB"))).float()[None] / 255
