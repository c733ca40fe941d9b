"""Charts drawn with Pillow, which the host brings: lines, steps, bands and dots on axes with ticks, and lettering."""

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..editing.inputs import interruptible, rgb_bytes

SMOOTHING = 2  # everything is drawn so many times larger, then made smaller, for smooth edges
ROWS_AT_ONCE = 512  # that are made smaller before the next look at whether the user has cancelled

Colour = tuple[int, int, int] | str

PAPER = (255, 255, 255)
INK = (33, 37, 41)
FAINT_INK = (108, 117, 125)
GRID = (233, 236, 239)
BAND = (222, 226, 230)
REFERENCE = (134, 142, 150)
SERIES = ((25, 113, 194), (232, 89, 12))  # told apart by colour-blind people, and in grey


# Of Linux, Windows and macOS, for letters that Pillow's own typeface lacks: accents, other alphabets, Chinese, Japanese,
# Korean.
TYPEFACES = (
    "DejaVuSans.ttf",
    "arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "Arial Unicode.ttf",
    "AppleSDGothicNeo.ttc",
)


@cache
def font(size: float, typeface: str | None = None) -> ImageFont.FreeTypeFont | None:
    """Pillow's own typeface, so that pictures look alike everywhere, or one of the system's; None if it has not got it."""
    if typeface is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(typeface, size)
    except OSError:
        return None


def font_for(text: str, size: float) -> ImageFont.FreeTypeFont:
    """The first typeface at hand that has every letter of a text; Pillow's own if none has."""
    for typeface in (None, *TYPEFACES):
        letters = font(size, typeface)
        if letters is not None and has_letters(letters, text):
            return letters
    return font(size)


def has_letters(letters: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a typeface has them all: a letter it lacks is drawn as its sign for that."""
    lacking = bytes(letters.getmask("\U0010ffff"))
    return all(letter.isspace() or bytes(letters.getmask(letter)) != lacking for letter in set(text))


def as_image(picture: Image.Image) -> torch.Tensor:
    """A Pillow picture as an IMAGE [height, width, 3] in 0..1. Can be cancelled."""
    pixels = np.asarray(picture.convert("RGB"))
    image = np.empty(pixels.shape, np.float32)
    for top in interruptible(range(0, len(pixels), ROWS_AT_ONCE)):
        rows = slice(top, top + ROWS_AT_ONCE)
        image[rows] = pixels[rows].astype(np.float32) / 255
    return torch.from_numpy(image)


def as_pillow(image: torch.Tensor) -> Image.Image:
    """An IMAGE [height, width, 1, 3 or more channels] in 0..1 as a Pillow picture."""
    return Image.fromarray(rgb_bytes(image))


class Sheet:
    """A white picture to draw on, in pixels of the finished one."""

    def __init__(self, width: int, height: int):
        self.size = width, height
        self._picture = Image.new("RGB", (width * SMOOTHING, height * SMOOTHING), PAPER)
        self._draw = ImageDraw.Draw(self._picture)
        self._pasted = []

    def text(
        self,
        at: tuple[float, float],
        text: str,
        size: float = 15,
        colour: Colour = INK,
        anchor: str = "la",
        within: float = math.inf,
    ) -> None:
        """`anchor`: Pillow's, such as "la" for left and top, "mm" for the middle. `within`: the width it is cut off at."""
        letters = font_for(text, size * SMOOTHING)
        if letters.getlength(text) > within * SMOOTHING:
            fits = bisect(range(len(text)), within * SMOOTHING, key=lambda end: letters.getlength(text[:end] + "..."))
            text = text[: max(fits - 1, 0)].rstrip() + "..."
        self._draw.text(_large(at), text, fill=colour, font=letters, anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour = INK, width: float = 1.0) -> None:
        self._draw.line([_large(point) for point in points], colour, round(width * SMOOTHING), joint="curve")

    def dashes(
        self, points: Sequence[tuple[float, float]], colour: Colour = INK, width: float = 1.0, dash: float = 7.0
    ) -> None:
        """A line of dashes, as long as the gaps between them."""
        drawn, piece = 0.0, [points[0]]
        for start, end in zip(points, points[1:]):
            length, done = math.dist(start, end), 0.0
            while done < length:
                step = min(dash - drawn, length - done)
                drawn, done = drawn + step, done + step
                share = done / length
                piece.append((start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])))
                if drawn >= dash:
                    if piece[0] is not None:
                        self.line(piece, colour, width)
                        piece, drawn = [None], 0.0
                    else:
                        piece, drawn = [piece[-1]], 0.0
        if piece[0] is not None and len(piece) > 1:
            self.line(piece, colour, width)

    def area(self, points: Sequence[tuple[float, float]], colour: Colour) -> None:
        self._draw.polygon([_large(point) for point in points], fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self._draw.rectangle([*_large((left, top)), *_large((right, bottom))], fill=colour)

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self._draw.ellipse([*_large((x - radius, y - radius)), *_large((x + radius, y + radius))], fill=colour)

    def paste(
        self, picture: Image.Image, left: float, top: float, width: float, height: float, resample: Image.Resampling
    ) -> None:
        """A picture on top of what is drawn, resized with one of Pillow's filters; unchanged if it has that size."""
        size = round(width), round(height)
        resized = picture if picture.size == size else picture.resize(size, resample)
        self._pasted.append((resized, (round(left), round(top))))

    def finish(self) -> Image.Image:
        width, height = self.size
        picture = Image.new("RGB", self.size)
        for top in interruptible(range(0, height, ROWS_AT_ONCE)):
            below = min(top + ROWS_AT_ONCE, height)
            rows = self._picture.crop((0, top * SMOOTHING, width * SMOOTHING, below * SMOOTHING))
            picture.paste(rows.resize((width, below - top), Image.Resampling.BOX), (0, top))
        for part, corner in self._pasted:
            picture.paste(part, corner)
        return picture


def _large(point: tuple[float, float]) -> tuple[float, float]:
    return point[0] * SMOOTHING, point[1] * SMOOTHING


@dataclass
class Chart:
    """Axes on a sheet. Data beyond the limits are cut off at the edge.

    `place`: left, top, right and bottom of the plot itself, in pixels. `x`, `y`: limits. `logarithmic`: of base 2, in y.
    """

    sheet: Sheet
    place: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]
    logarithmic: bool = False

    def frame(
        self,
        title: str,
        x_label: str = "",
        x_ticks: Sequence[float] | None = None,
        y_ticks: Sequence[float] | None = None,
        write: Callable[[float], str] = "{:g}".format,
        y_labels: bool = True,
    ) -> None:
        """Title, grid, ticks with their numbers, and what x is."""
        left, top, right, bottom = self.place
        self.sheet.text((left, top - 12), title, 17, anchor="ls")
        for value in y_ticks if y_ticks is not None else ticks(*self.y):
            _, height = self.at(self.x[0], value)
            self.sheet.line([(left, height), (right, height)], GRID)
            if y_labels:
                self.sheet.text((left - 8, height), write(value), 13, FAINT_INK, "rm")
        for value in x_ticks if x_ticks is not None else ticks(*self.x):
            across, _ = self.at(value, self.y[0])
            self.sheet.line([(across, bottom), (across, bottom + 4)], REFERENCE)
            self.sheet.text((across, bottom + 8), f"{value:g}", 13, FAINT_INK, "ma")
        self.sheet.line([(left, bottom), (right, bottom)], REFERENCE)
        if x_label:
            self.sheet.text(((left + right) / 2, bottom + 28), x_label, 14, FAINT_INK, "ma")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a value lies on the sheet."""
        left, top, right, bottom = self.place
        low, high = (math.log2(limit) for limit in self.y) if self.logarithmic else self.y
        y = math.log2(max(y, 1e-12)) if self.logarithmic else y
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (min(max(y, low), high) - low) / (high - low)
        return left + min(max(across, 0.0), 1.0) * (right - left), bottom - up * (bottom - top)

    def line(
        self, xs: Sequence[float], ys: Sequence[float], colour: Colour, width: float = 2.5, dots: bool = False
    ) -> None:
        points = [self.at(x, y) for x, y in zip(xs, ys)]
        if len(points) > 1:
            self.sheet.line(points, colour, width)
        if dots or len(points) == 1:
            for x, y in points:
                self.sheet.dot(x, y, 1.6 * width, colour)

    def steps(self, xs: Sequence[float], ys: Sequence[float], colour: Colour, width: float = 2.0) -> None:
        """The outline of bars around evenly spaced `xs`."""
        half = (xs[1] - xs[0]) / 2
        corners = [self.at(x + side, y) for x, y in zip(xs, ys) for side in (-half, half)]
        self.sheet.line(corners, colour, width)

    def dashes(self, xs: Sequence[float], ys: Sequence[float], colour: Colour, width: float = 1.5) -> None:
        self.sheet.dashes([self.at(x, y) for x, y in zip(xs, ys)], colour, width)

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], colour: Colour = BAND) -> None:
        there = [self.at(x, y) for x, y in zip(xs, high)]
        back = [self.at(x, y) for x, y in zip(xs, low)]
        self.sheet.area(there + back[::-1], colour)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between two limits."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-6)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-6) + 1)]
