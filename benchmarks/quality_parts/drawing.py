"""Trade-off curves and contact sheets, drawn with Pillow."""

import torch
from PIL import Image
from torch import Tensor

from ...pictures.charts import PAPER, Chart, Sheet, as_pillow, font_for
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
    sheet = Sheet(columns * PANEL[0], rows * PANEL[1] + LEGEND)
    for index, (edit, compared) in enumerate(results.items()):
        corner = index % columns * PANEL[0], index // columns * PANEL[1]
        _panel(sheet, corner, edit, [result for result in compared if result.curve], colours)
    _legend(sheet, rows * PANEL[1], colours)
    return sheet.finish()


def _legend(sheet: Sheet, top: int, colours: dict[str, str]) -> None:
    x = 14
    for name, colour in colours.items():
        width = 48 + round(font_for(name, 13).getlength(name))
        if x + width > sheet.size[0]:
            x, top = 14, top + 22
        sheet.line([(x, top + 10), (x + 18, top + 10)], colour, 4)
        sheet.text((x + 24, top + 10), name, 13, anchor="lm")
        x += width


def _panel(sheet: Sheet, corner: tuple[int, int], edit: str, results: list[Result], colours: dict[str, str]) -> None:
    local = "background" in results[0].test
    cost, error = ("background", "inside") if local else ("structure", "whole")
    shown = [figures for result in results for figures in (result.test, *(figures for _, figures in result.curve))]
    widest, highest = (max(1.0, 1.08 * max(figures[name][0] for figures in shown)) for name in (cost, error))
    place = tuple(side + corner[number % 2] for number, side in enumerate(FRAME))
    chart = Chart(sheet, place, (0.0, widest), (0.0, highest))
    chart.frame(f"{edit}: {error} error", f"{cost} error")
    for result in results:
        colour = colours[result.method]
        points = [(figures[cost][0], figures[error][0]) for _, figures in result.curve]
        chart.line(*zip(*points), colour, 2)
        for figures, radius in ((result.test, 7), *((figures, 4) for _, figures in result.curve)):
            x, y = chart.at(figures[cost][0], figures[error][0])
            sheet.dot(x, y, radius, colour)
            if figures["hit"][0] < ENOUGH:
                sheet.dot(x, y, radius - 2, PAPER)


def contact_sheet(rows: dict[str, Tensor]) -> Image.Image:
    """Labelled rows of pictures [B, H, W, 3], the first eight of each."""
    _, height, width, _ = next(iter(rows.values())).shape
    count = min(SHOWN, *(len(pictures) for pictures in rows.values()))
    sheet = Sheet(LABEL + count * width, len(rows) * height)
    for index, (label, pictures) in enumerate(rows.items()):
        strip = as_pillow(torch.cat(list(pictures[:count]), dim=1))
        sheet.paste(strip, LABEL, index * height, *strip.size, Image.Resampling.LANCZOS)
        sheet.text((8, (index + 0.5) * height), label, anchor="lm")
    return sheet.finish()
