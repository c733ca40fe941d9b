"""Trade-off curves and contact sheets, drawn with Pillow."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .tuning import Result

PANEL = (520, 430)
FRAME = (60, 34, 500, 370)  # left, top, right and bottom of a panel's axes
LEGEND = 50
LABEL = 190
SHOWN = 8
PALETTE = ("#d81b60", "#ff9e1b", "#8e44ad", "#1e6fd9", "#12a4b4", "#2e9e4f", "#7a5c3e", "#666666", "#b0a400")
INK, GRID = "#222222", "#dddddd"


def trade_off(results: dict[str, list[Result]]) -> Image.Image:
    """One panel for each edit: how much is edited (hit rate) over what it costs, a line for each method over its knob.

    The cost is the background error, or the whole-picture error where the edit leaves no background. Lines are the tuning
    scenes, discs the frozen knob on the test scenes. Up and left is better.
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
    cost = "background" if "background" in results[0].test else "whole"
    panel = Image.new("RGB", PANEL, "white")
    draw, font = ImageDraw.Draw(panel), _font(13)
    left, top, right, bottom = FRAME
    most = 1.08 * max(
        figures[cost][0] for result in results for figures in (result.test, *(f for _, f in result.curve))
    )

    def at(figures: dict) -> tuple[float, float]:
        return left + (right - left) * figures[cost][0] / most, bottom - (bottom - top) * figures["hit"][0]

    for share in (0.0, 0.25, 0.5, 0.75, 0.95, 1.0):
        y = bottom - (bottom - top) * share
        draw.line((left, y, right, y), fill=INK if share == 0 else GRID)
        if share != 1.0:
            draw.text((left - 8, y), f"{share:g}", fill=INK, font=font, anchor="rm")
    spacing = next(step for step in (1, 2, 5, 10, 20, 50, 100) if most / step <= 8)
    for tick in range(0, int(most) + 1, spacing):
        x = left + (right - left) * tick / most
        draw.line((x, top, x, bottom), fill=GRID)
        draw.text((x, bottom + 6), str(tick), fill=INK, font=font, anchor="mt")
    draw.text((left, 8), f"{edit}: hit rate", fill=INK, font=_font(15))
    draw.text(((left + right) / 2, bottom + 26), f"{cost} error (0 to 255)", fill=INK, font=font, anchor="mt")
    for result in results:
        colour, points = colours[result.method], [at(figures) for _, figures in result.curve]
        draw.line(points, fill=colour, width=2)
        for x, y in points:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        x, y = at(result.test)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour, outline=INK)
    return panel


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
