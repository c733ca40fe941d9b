"""Pictures side by side, labelled. Run with the environment's Python, which has Pillow.

usage: comparison.py RESULT.png LABEL=PICTURE.png ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HEIGHT, GAP, BAND = 256, 8, 28


def draw_comparison(pictures: dict[str, Image.Image], height: int = HEIGHT) -> Image.Image:
    """One row of pictures, ``height`` pixels high, with their labels below."""
    font = ImageFont.load_default(size=14)
    scaled = {
        label: picture.convert("RGB").resize(
            (picture.width * height // picture.height, height), Image.Resampling.LANCZOS
        )
        for label, picture in pictures.items()
    }
    width = sum(picture.width + GAP for picture in scaled.values()) + GAP
    sheet = Image.new("RGB", (width, height + GAP + BAND), "white")
    draw = ImageDraw.Draw(sheet)
    x = GAP
    for label, picture in scaled.items():
        sheet.paste(picture, (x, GAP))
        draw.text((x + picture.width / 2, height + GAP + BAND / 2), label, "black", font, anchor="mm")
        x += picture.width + GAP
    return sheet


if __name__ == "__main__":
    result, *named = sys.argv[1:]
    parts = [item.partition("=") for item in named]
    draw_comparison({label: Image.open(Path(path)) for label, _, path in parts}).save(result)
