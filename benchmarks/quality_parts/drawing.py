"""Trade-off curves and contact sheets, drawn with Pillow."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .tuning import ENOUGH, Result

PANEL = (520, 430)
FRAME = (60, 34, 500, 370)  # left, top, right and bottom of a panel's axes
LEGEND = 94
LABEL = 190
SHOWN = 8
PALETTE = (
    *("#d81b60", "#ff9e1b", "#8e44ad", "#e58fb4", "#1e6fd9", "#12a4b4"),
    *("#2e9e4f", "#7a5c3e", "#666666", "#b0a400", "#6b2d1f"),
)
INK, GRID = "#222222", "#dddddd"


def trade_off(results: dict[str, list[Result]]) -> Image.Image:
    """One panel for each edit: what is wrong where it should act over what it breaks elsewhere; down and left is better.

    A line for each method over its knob on the tuning scenes, a large disc for the frozen knob on the test scenes. Discs
    are hollow where the judge sees too few of the edits. Edits of the whole picture have no elsewhere: there it is
    the whole picture's error over the structure error.
    """
    methods = list(dict.fromkeys(result.method for rows in results.values() for result in rows if result.curve))
    colours = dict(zip(methods, PALETTE * (1 + len(methods) // len(PALETTE))))
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    canvas = Image.new("RGB", (columns * PANEL[0], rows * PANEL[1] + LEGEND), "white")
    for index, (edit, compared) in enumerate(results.items()):
        place = index % columns * PANEL[0], index // columns * PANEL[1]
        canvas.paste(_panel(edit, [result for result in compared if result.curve], colours), place)
    _legend(canvas, rows * PANEL[1], colours)
    return canvas


def _legend(canvas: Image.Image, top: int, colours: dict[str, str]) -> None:
    draw, font, x = ImageDraw.Draw(canvas), _font(13), 14
    for name, colour in colours.items():
        width = 48 + round(font.getlength(name))
        if x + width > canvas.width:
            x, top = 14, top + 22
        draw.line((x, top + 10, x + 18, top + 10), fill=colour, width=4)
        draw.text((x + 24, top + 10), name, fill=INK, font=font, anchor="lm")
        x += width


def _panel(edit: str, results: list[Result], colours: dict[str, str]) -> Image.Image:
    local = "background" in results[0].test
    cost, error = ("background", "inside") if local else ("structure", "whole")
    shown = [figures for result in results for figures in (result.test, *(figures for _, figures in result.curve))]
    panel = Image.new("RGB", PANEL, "white")
    draw, font = ImageDraw.Draw(panel), _font(13)
    left, top, right, bottom = FRAME
    widest, highest = (max(1.0, 1.08 * max(figures[name][0] for figures in shown)) for name in (cost, error))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / widest, bottom - (bottom - top) * y / highest

    for tick in _ticks(widest):
        draw.line((*at(tick, 0), *at(tick, highest)), fill=GRID)
        draw.text((at(tick, 0)[0], bottom + 6), f"{tick:g}", fill=INK, font=font, anchor="mt")
    for tick in _ticks(highest):
        draw.line((*at(0, tick), *at(widest, tick)), fill=GRID)
        draw.text((left - 8, at(0, tick)[1]), f"{tick:g}", fill=INK, font=font, anchor="rm")
    draw.text((left, 8), f"{edit}: {error} error", fill=INK, font=_font(15))
    draw.text(((left + right) / 2, bottom + 26), f"{cost} error", fill=INK, font=font, anchor="mt")
    for result in results:
        colour = colours[result.method]
        draw.line([at(figures[cost][0], figures[error][0]) for _, figures in result.curve], fill=colour, width=2)
        for figures, radius in ((result.test, 6), *((figures, 3) for _, figures in result.curve)):
            x, y = at(figures[cost][0], figures[error][0])
            inner = colour if figures["hit"][0] >= ENOUGH else "white"
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=inner, outline=colour, width=2)
    return panel


def _ticks(most: float) -> list[float]:
    spacing = next(step for step in (0.5, 1, 2, 5, 10, 20, 50, 100) if most / step <= 8)
    return [spacing * index for index in range(int(most / spacing) + 1)]


def contact_sheet(rows: dict[str, Tensor]) -> Image.Image:
    """Labelled rows of pictures [B, H, W, 3], the first eight of each."""
    _, height, width, _ = next(iter(rows.values())).shape
    count = min(SHOWN, *(len(pictures) for pictures in rows.values()))
    sheet = Image.new("RGB", (LABEL + count * width, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (label, pictures) in enumerate(rows.items()):
        strip = torch.cat(list(pictures[:count]), dim=1).clamp(0, 1).mul(255).round().byte().cpu().numpy()
        sheet.paste(Image.fromarray(strip), (LABEL, index * height))
        draw.multiline_text((8, (index + 0.5) * height), label, fill=INK, font=_font(15), anchor="lm")
    return sheet


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)
