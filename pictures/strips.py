"""Labelled pictures side by side, and the numbers that such a row is drawn for."""

import math
import re
from collections.abc import Sequence

import torch
from PIL import Image

from ..editing.inputs import check_image, check_text, interruptible
from . import charts

SMALLEST = 256
"""Smaller pictures are enlarged, so that labels fit under them."""
LONGEST_ENLARGED = 2048
MOST_PIXELS = 64_000_000
MARGIN = 16
MOST_NUMBERS = 100
LONGEST_LABEL = 10_000


def read_numbers(text: str) -> list[float]:
    """The numbers between commas, semicolons or white space.

    Raises ValueError if there is none or more than `MOST_NUMBERS`, or for other words.
    """
    check_text(text, "values", 100 * MOST_NUMBERS)
    words = re.split(r"[,;\s]+", text.strip(", ;\n\t"))
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"values: {text!r} is not a list of numbers. Write for example '0, 0.5, 1, 1.5'.")
    if len(numbers) > MOST_NUMBERS:
        raise ValueError(f"values: {len(numbers)} numbers are as many runs, and at most {MOST_NUMBERS} go. Take fewer.")
    return numbers


def picture_strip(
    images: Sequence[torch.Tensor], labels: Sequence[str], columns: int = 0, source: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Pictures in rows with a label under each: IMAGE [1, height, width, 3].

    `images`, `source`: IMAGEs [B, height, width, channels]; those of `source` come first, labelled "source". `labels`: one
    text with a line for each picture, or a text for each; they may be too few. `columns`: pictures in a row, 0 for all.
    Small pictures are enlarged. Raises ValueError for what is no picture or no text, for more labels than pictures, and
    for a strip of more than `MOST_PIXELS`.
    """
    for socket, batches in (("source", source), ("images", images)):
        for batch in batches:
            check_image(batch, socket)
    for label in labels:
        check_text(label, "labels", LONGEST_LABEL)
    before = [picture for batch in source for picture in batch]
    pictures = before + [picture for batch in images for picture in batch]
    if not pictures:
        raise ValueError("images: the list is empty. Connect at least one picture.")
    lines = labels[0].splitlines() if len(labels) == 1 else [" ".join(label.split()) for label in labels]
    if len(before) + len(lines) > len(pictures):
        raise ValueError(
            f"labels: there are {len(lines)} for {len(pictures) - len(before)} pictures. Give one for each."
        )
    captions = ["source"] * len(before) + lines
    captions += [""] * (len(pictures) - len(captions))
    return charts.as_image(_lay_out(pictures, captions, columns or len(pictures)))[None]


def _lay_out(pictures: list[torch.Tensor], captions: list[str], columns: int) -> Image.Image:
    height, width = pictures[0].shape[:2]
    scale = max(1, min(math.ceil(SMALLEST / min(height, width)), LONGEST_ENLARGED // max(height, width)))
    height, width = scale * height, scale * width
    columns = min(columns, len(pictures))
    lettering = max(16, round(min(height, width) / 16))
    line = 2 * lettering if any(captions) else 0
    rows = math.ceil(len(pictures) / columns)
    size = MARGIN + columns * (width + MARGIN), MARGIN + rows * (height + line + MARGIN)
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(
            f"images: the strip would have {size[0]}x{size[1]} pixels, more than {MOST_PIXELS // 10**6} million. Give "
            "fewer or smaller pictures."
        )
    sheet = charts.Sheet(*size)
    for number, (picture, caption) in enumerate(interruptible(zip(pictures, captions))):
        left = MARGIN + number % columns * (width + MARGIN)
        top = MARGIN + number // columns * (height + line + MARGIN)
        sheet.paste(charts.as_pillow(picture), left, top, width, height, Image.Resampling.LANCZOS)
        sheet.text((left + width / 2, top + height + line / 2), caption, lettering, anchor="mm", within=width)
    return sheet.finish()
