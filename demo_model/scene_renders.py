"""Pictures of the demo scenes, and where the animal is in them."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scene import FURS, SIZE, Scene

SUPERSAMPLING = 2

Colour = tuple[int, int, int]

INK: Colour = (34, 30, 38)
GLASSES_RED: Colour = (214, 24, 52)
NIGHT_TINT = (0.70, 0.74, 0.94)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b))


def _scale(colour: Colour, factor: float | tuple[float, float, float]) -> Colour:
    factors = factor if isinstance(factor, tuple) else (factor,) * 3
    return tuple(min(255, max(0, round(v * f))) for v, f in zip(colour, factors))


class _Pen:
    """Draws in a subject's own units: origin at (x, y) pixels, one unit = `radius` pixels, turned by `angle`."""

    def __init__(
        self, image: Image.Image, at: tuple[float, float], radius: float, angle: float, flip: bool, tint
    ) -> None:
        self.draw, (self.x, self.y), self.radius, self.tint = ImageDraw.Draw(image), at, radius, tint
        self.cos, self.sin, self.sign = math.cos(angle), math.sin(angle), -1 if flip else 1

    def point(self, x: float, y: float) -> tuple[float, float]:
        x *= self.sign
        return (
            self.x + self.radius * (x * self.cos - y * self.sin),
            self.y + self.radius * (x * self.sin + y * self.cos),
        )

    def polygon(self, points, fill: Colour | None, outline: Colour | None = None, width: float = 0.09) -> None:
        corners = [self.point(*p) for p in points]
        if fill is not None:
            self.draw.polygon(corners, fill=_scale(fill, self.tint))
        if outline is not None:
            pixels = max(1, round(width * self.radius))
            self.draw.line(
                [*corners, corners[0], corners[1]], fill=_scale(outline, self.tint), width=pixels, joint="curve"
            )

    def ellipse(self, centre, radii, fill: Colour | None, outline: Colour | None = None, turn=0.0, width=0.09) -> None:
        (x, y), (a, b) = centre, radii
        cos, sin = math.cos(turn), math.sin(turn)
        circle = [(a * math.cos(k * math.pi / 20), b * math.sin(k * math.pi / 20)) for k in range(40)]
        self.polygon([(x + p * cos - q * sin, y + p * sin + q * cos) for p, q in circle], fill, outline, width)

    def line(self, points, colour: Colour, width: float) -> None:
        pixels = max(1, round(width * self.radius))
        corners = [self.point(*p) for p in points]
        self.draw.line(corners, fill=_scale(colour, self.tint), width=pixels, joint="curve")
        for x, y in (corners[0], corners[-1]):
            self.draw.ellipse(
                (x - pixels / 2, y - pixels / 2, x + pixels / 2, y + pixels / 2), fill=_scale(colour, self.tint)
            )


def _draw_background(scene: Scene, n: int) -> Image.Image:
    if scene.night:
        top, bottom = (26, 30, 84), (66, 68, 134)
    elif scene.winter:
        top, bottom = (136, 178, 220), (208, 222, 236)
    else:
        top, bottom = (84, 162, 238), (182, 220, 248)
    top, bottom = (tuple(v + s * scene.sky for v, s in zip(c, (14, -4, -10))) for c in (top, bottom))
    ramp = np.linspace(0, 1, n)[:, None, None]
    sky = np.broadcast_to(np.array(top) * (1 - ramp) + np.array(bottom) * ramp, (n, n, 3))
    image = Image.fromarray(sky.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    tint = 0.5 if scene.night else 1.0
    x, y, r = scene.orb_x * n, 0.13 * n, 0.08 * n
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(238, 238, 206) if scene.night else (255, 216, 66))
    ground = _scale((236, 241, 248) if scene.winter else (112, 182, 78), tint)
    horizon = scene.horizon * n
    draw.rectangle((0, horizon, n, n), fill=ground)
    left, width = scene.thing_x * n, 0.10 * n
    snow = _scale((226, 234, 244), tint)
    if scene.thing == "tree":
        trunk, leaves = _scale((116, 78, 48), tint), snow if scene.winter else _scale((44, 128, 58), tint)
        draw.rectangle((left - 0.025 * n, horizon - 0.14 * n, left + 0.025 * n, horizon + 0.05 * n), fill=trunk)
        draw.ellipse((left - 1.15 * width, horizon - 0.36 * n, left + 1.15 * width, horizon - 0.11 * n), fill=leaves)
    elif scene.thing == "house":
        walls, roof = _scale((214, 176, 132), tint), snow if scene.winter else _scale((172, 70, 56), tint)
        draw.rectangle((left - width, horizon - 0.16 * n, left + width, horizon + 0.05 * n), fill=walls)
        eaves = horizon - 0.15 * n
        draw.polygon([(left - 1.3 * width, eaves), (left + 1.3 * width, eaves), (left, eaves - 0.15 * n)], fill=roof)
    return image


@dataclass(frozen=True)
class _Coat:
    fur: Colour
    outline: Colour
    light: Colour
    mane: Colour


def _coat(scene: Scene) -> _Coat:
    if scene.subject == "zebra":
        fur = (240, 239, 236)
        return _Coat(fur, (92, 90, 98), (92, 88, 98), INK)
    fur = FURS[scene.fur]
    outline = (22, 20, 28) if scene.fur == "black" else _scale(fur, 0.55)
    return _Coat(fur, outline, _mix(fur, (255, 248, 236), 0.62), _mix(outline, (60, 40, 30), 0.5))


def _draw_body(pen: _Pen, scene: Scene, coat: _Coat) -> None:
    hoofed = scene.subject in ("horse", "zebra")
    feet = (64, 56, 58) if hoofed else coat.light
    tail = coat.mane if hoofed else coat.fur
    standing = scene.pose == "standing"
    if standing:
        pen.line([(1.45, 1.15), (1.95, 0.75), (2.05, 0.35)], coat.outline, 0.42)
        pen.line([(1.45, 1.15), (1.95, 0.75), (2.05, 0.35)], tail, 0.28)
        legs = ((-0.30, 2.02), (0.30, 2.06), (0.95, 2.02), (1.42, 2.06))
        centre, radii = (0.55, 1.12), (1.12, 0.58)
    else:
        pen.line([(0.5, 1.75), (1.15, 1.75), (1.4, 1.25)], coat.outline, 0.42)
        pen.line([(0.5, 1.75), (1.15, 1.75), (1.4, 1.25)], tail, 0.28)
        legs = ((-0.34, 2.02), (0.34, 2.02))
        centre, radii = (0.0, 1.30), (0.80, 0.78)
    if not standing:
        pen.ellipse(centre, radii, coat.fur, coat.outline)
    for x, bottom in legs:
        pen.polygon([(x - 0.21, 1.2), (x + 0.21, 1.2), (x + 0.21, bottom), (x - 0.21, bottom)], coat.fur, coat.outline)
        pen.ellipse((x, bottom - 0.06), (0.26, 0.17), feet, coat.outline)
    if standing:
        pen.ellipse(centre, radii, coat.fur, coat.outline)
    if scene.subject == "zebra":
        if standing:
            stripes = [[(x, 1.12 - h), (x - 0.1, 1.12 + h)] for x, h in ((0.72, 0.42), (1.25, 0.32))]
        else:
            stripes = [[(side * 0.64, 1.10), (side * 0.34, 1.20)] for side in (-1, 1)] + [[(-0.28, 1.66), (0.28, 1.66)]]
        for stripe in stripes:
            pen.line(stripe, INK, 0.22)
    elif not standing:
        pen.ellipse((0, 1.38), (0.40, 0.42), coat.light)


def _draw_eyes(pen: _Pen, scene: Scene, iris: Colour) -> None:
    for side in (-1, 1):
        if scene.glasses:
            pen.ellipse((side * 0.46, -0.10), (0.44, 0.44), (226, 242, 255))
        pen.ellipse((side * 0.44, -0.10), (0.22, 0.24), iris, INK, width=0.07)
        pen.ellipse((side * 0.44, -0.08), (0.11, 0.16), INK)
    if scene.glasses:
        pen.line([(-0.06, -0.12), (0.06, -0.12)], GLASSES_RED, 0.17)
        for side in (-1, 1):
            pen.ellipse((side * 0.46, -0.10), (0.43, 0.43), None, GLASSES_RED, width=0.16)


def _draw_cat_head(pen: _Pen, scene: Scene, coat: _Coat) -> None:
    for side in (-1, 1):
        pen.polygon([(side * 0.97, -0.15), (side * 0.92, -1.22), (side * 0.16, -0.75)], coat.fur, coat.outline)
        pen.polygon([(side * 0.80, -0.45), (side * 0.78, -0.92), (side * 0.42, -0.70)], (240, 158, 168))
    pen.ellipse((0, 0), (1.02, 0.86), coat.fur, coat.outline)
    pen.ellipse((0, 0.44), (0.42, 0.27), coat.light)
    pen.polygon([(-0.16, 0.24), (0.16, 0.24), (0, 0.44)], (232, 104, 128))
    _draw_eyes(pen, scene, (146, 220, 88))


def _draw_dog_head(pen: _Pen, scene: Scene, coat: _Coat) -> None:
    pen.ellipse((0, 0), (0.94, 0.92), coat.fur, coat.outline)
    for side in (-1, 1):
        pen.ellipse((side * 0.96, 0.12), (0.30, 0.70), _scale(coat.fur, 0.68), coat.outline, turn=-side * 0.22)
    pen.ellipse((0, 0.80), (0.20, 0.30), (236, 96, 116))
    pen.ellipse((0, 0.46), (0.50, 0.34), coat.light, coat.outline)
    pen.ellipse((0, 0.30), (0.25, 0.17), INK)
    _draw_eyes(pen, scene, (250, 248, 244))


def _draw_horse_head(pen: _Pen, scene: Scene, coat: _Coat) -> None:
    for side in (-1, 1):
        pen.ellipse((side * 0.50, -0.98), (0.20, 0.40), coat.fur, coat.outline, turn=side * 0.25)
    pen.ellipse((0, -0.12), (0.80, 0.80), coat.fur, coat.outline)
    if scene.subject == "zebra":
        for side in (-1, 1):
            pen.line([(side * 0.66, -0.56), (side * 0.30, -0.42)], INK, 0.21)
            pen.line([(side * 0.72, 0.30), (side * 0.34, 0.26)], INK, 0.21)
    pen.ellipse((0, 0.66), (0.58, 0.46), coat.light, coat.outline)
    for side in (-1, 1):
        pen.ellipse((side * 0.26, 0.66), (0.12, 0.16), coat.mane if scene.subject == "horse" else (20, 18, 24))
    pen.ellipse((0, -0.78), (0.26, 0.44), coat.mane)
    _draw_eyes(pen, scene, (250, 244, 226))


_HEADS = {"cat": _draw_cat_head, "dog": _draw_dog_head, "horse": _draw_horse_head, "zebra": _draw_horse_head}


def _draw_subject(image: Image.Image, scene: Scene, n: int) -> None:
    tint = NIGHT_TINT if scene.night else 1.0
    position = (image, (scene.x * n, scene.y * n), scene.size * n)
    coat = _coat(scene)
    _draw_body(_Pen(*position, 0.0, scene.flip, tint), scene, coat)
    _HEADS[scene.subject](_Pen(*position, scene.tilt, scene.flip, tint), scene, coat)


def _rows_and_columns(picture: np.ndarray) -> np.ndarray:
    """Of the picture as it is at 128x128, each [height, width, 1]."""
    size = picture.shape[0]
    return np.mgrid[0:size, 0:size].astype(np.float32)[..., None] * (SIZE / size)


def _pencil(picture: np.ndarray) -> np.ndarray:
    rows, columns = _rows_and_columns(picture)
    hatching = 0.5 + 0.5 * np.sin(2 * np.pi * (rows + columns) / 8)
    light = picture @ np.array([[0.30], [0.59], [0.11]], np.float32)
    padded = np.pad(light, ((1, 1), (1, 1), (0, 0)), mode="edge")
    edges = np.hypot(padded[2:, 1:-1] - padded[:-2, 1:-1], padded[1:-1, 2:] - padded[1:-1, :-2])
    grey = 0.98 - (1 - light) * (0.48 + 0.22 * hatching) - 0.7 * edges
    return np.repeat(grey, 3, axis=2) * np.array([1.0, 0.99, 0.96], np.float32)


def _pastel(picture: np.ndarray) -> np.ndarray:
    rows, columns = _rows_and_columns(picture)
    blotches = np.sin(2 * np.pi * rows / 16) * np.sin(2 * np.pi * columns / 16)
    mean = picture.mean(axis=2, keepdims=True)
    warm = (mean + 1.45 * (picture - mean)) * np.array([1.10, 0.98, 0.78], np.float32) + np.array(
        [0.05, 0.0, 0.03], np.float32
    )
    return warm * (1 + 0.11 * blotches)


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Draw `scene`: uint8 RGB array of shape [size, size, 3]. The demo model knows pictures of 128."""
    n = size * SUPERSAMPLING
    image = _draw_background(scene, n)
    _draw_subject(image, scene, n)
    image = image.resize((size, size), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(0.8))
    picture = np.asarray(image, dtype=np.float32) / 255
    if scene.style == "pencil sketch":
        picture = _pencil(picture)
    elif scene.style == "oil pastel":
        picture = _pastel(picture)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def subject_mask(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Where the animal is: bool array of shape [size, size], true in every pixel it touches."""
    n = size * SUPERSAMPLING
    drawn = []
    for backdrop in ((255, 0, 255), (0, 255, 0)):
        image = Image.new("RGB", (n, n), backdrop)
        _draw_subject(image, scene, n)
        drawn.append(np.asarray(image))
    covered = (drawn[0] == drawn[1]).all(axis=-1)
    return covered.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).any(axis=(1, 3))
