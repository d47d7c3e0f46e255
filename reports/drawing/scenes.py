"""Plain drawings made of strokes, marks and words: an SVG for the page, a PNG for Markdown.

A report of 500 rows has dozens of pictures of intervals. Drawn here one takes a few milliseconds
and kilobytes, which matplotlib (`reports.charts`) does not. Lengths are in pixels of a field
`WIDTH` wide, y downwards; colours are the CSS variables of the page, in the PNG those of its light
theme. Where tones differ, shapes differ too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from reports.drawing.palette import SURFACE, VARIABLES, Drawing
from reports.layout import html_page

WIDTH = 760
FINE, COARSE = 3, 2
"""The PNG is drawn with so many pixels a pixel of the field, then so many are averaged."""

SHADES = 64
"""Colours of a PNG: those of `TONES` that are on it, and what lies between them at edges."""

TONES = {
    **VARIABLES,
    "good": "#1d6a35",
    "bad": "#a3241b",
    "tint": "#e8f1f9",
}


def _around(corners: int, *lengths: float) -> tuple[tuple[float, float], ...]:
    """Return corners on circles around 0, the first one up."""
    angles = [2 * math.pi * place / corners for place in range(corners)]
    reach = [lengths[place % len(lengths)] for place in range(corners)]
    return tuple(
        (far * math.sin(angle), -far * math.cos(angle))
        for angle, far in zip(angles, reach, strict=True)
    )


SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": _around(16, 1.15),
    "star": _around(10, 1.4, 0.55),
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "diamond": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    "up": ((0, -1.3), (1.3, 1), (-1.3, 1)),
    "down": ((0, 1.3), (1.3, -1), (-1.3, -1)),
    "left": ((-1.3, 0), (1, 1.3), (1, -1.3)),
    "right": ((1.3, 0), (-1, 1.3), (-1, -1.3)),
    "bar": ((-0.5, -1.4), (0.5, -1.4), (0.5, 1.4), (-0.5, 1.4)),
    "octagon": (
        *((-0.5, -1.2), (0.5, -1.2), (1.2, -0.5), (1.2, 0.5)),
        *((0.5, 1.2), (-0.5, 1.2), (-1.2, 0.5), (-1.2, -0.5)),
    ),
}
"""Outlines of marks, 1 being half their size."""


@dataclass(frozen=True)
class Stroke:
    """A line through points; `dashes` are lengths drawn and left out, in turns."""

    points: tuple[tuple[float, float], ...]
    tone: str = "ink"
    width: float = 1.0
    dashes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Field:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    tone: str


@dataclass(frozen=True)
class Mark:
    """A mark of one of `SHAPES`.

    `title` is what it stands for, told on hovering; `link` is where in the page it leads to.
    """

    x: float
    y: float
    shape: str
    tone: str
    size: float = 4.0
    filled: bool = True
    title: str = ""
    link: str = ""

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """The corners of the mark."""
        return tuple(
            (self.x + self.size * a, self.y + self.size * b) for a, b in SHAPES[self.shape]
        )


@dataclass(frozen=True)
class Words:
    """A line of text at (x, y), its base line; `anchor` is start, middle or end."""

    x: float
    y: float
    text: str
    tone: str = "ink"
    size: float = 12.0
    anchor: str = "start"
    bold: bool = False


Item = Stroke | Field | Mark | Words


@dataclass(frozen=True)
class Scene:
    """A drawing: its height and what is on it, the lowest first."""

    height: float
    items: tuple[Item, ...]


def drawing(scene: Scene) -> Drawing:
    """Return `scene` in both forms."""
    parts = _parts(scene.items)
    svg = html_page("scene.svg.jinja", {}, scene=scene, wide=WIDTH, parts=parts)
    return Drawing(_png(scene), svg)


def text_width(text: str, size: float = 12.0, bold: bool = False) -> float:
    """Return how wide `text` is in the PNG; the fonts of pages are hardly wider."""
    return _length(text, size, bold) / FINE


@lru_cache(maxsize=4096)
def _length(text: str, size: float, bold: bool) -> float:
    return _font(size, bold).getlength(text)


def shortened(text: str, width: float, size: float = 12.0) -> str:
    """Return `text`, its end replaced by … where it is wider than `width`."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(f"{text}…", size) > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


@dataclass(frozen=True)
class Part:
    """An item as the template writes it: its kind, its numbers as text, and the item."""

    kind: str
    data: str
    item: Item


def _parts(items: Iterable[Item]) -> list[Part]:
    parts = []
    for item in items:
        if isinstance(item, Words):
            parts.append(Part("words", "", item))
        elif isinstance(item, Field):
            box = f"M{_short(item.x)} {_short(item.y)}h{_short(item.width)}v{_short(item.height)}"
            parts.append(Part("field", f"{box}h-{_short(item.width)}z", item))
        elif isinstance(item, Mark):
            parts.append(Part("mark", f"{_outline(item.points)}z", item))
        elif parts and _alike(parts[-1].item, item):
            parts[-1] = replace(parts[-1], data=parts[-1].data + _outline(item.points))
        else:
            parts.append(Part("stroke", _outline(item.points), item))
    return parts


def _alike(before: Item, stroke: Stroke) -> bool:
    """Whether `stroke` may be written into the path of the item before it."""
    return isinstance(before, Stroke) and replace(before, points=stroke.points) == stroke


def _outline(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points)


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _png(scene: Scene) -> bytes:
    size = (WIDTH * FINE, round(scene.height * FINE))
    image = Image.new("RGB", size, SURFACE)
    brush = ImageDraw.Draw(image)
    for item in scene.items:
        if isinstance(item, Words):
            _write(image, item)
        else:
            _paint(brush, item)
    file = io.BytesIO()
    # Tones are few: a palette of them takes a third of the bytes and of the time to pack them.
    shades = image.reduce(COARSE).quantize(SHADES, Image.Quantize.FASTOCTREE)
    shades.save(file, "PNG", compress_level=4)
    return file.getvalue()


def _write(image: Image.Image, item: Words) -> None:
    stamp, left, top = _stamp(item.text, item.size, item.bold, item.anchor)
    place = (round(item.x * FINE + left), round(item.y * FINE + top))
    image.paste(TONES[item.tone], (*place, place[0] + stamp.width, place[1] + stamp.height), stamp)


@lru_cache(maxsize=2048)
def _stamp(text: str, size: float, bold: bool, anchor: str) -> tuple[Image.Image, float, float]:
    """Return `text` as a mask, and where it lies from its place: pictures repeat their labels."""
    font = _font(size, bold)
    how = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
    left, top, right, bottom = font.getbbox(text, anchor=how)
    mask = Image.new("L", (max(1, math.ceil(right - left)), max(1, math.ceil(bottom - top))))
    ImageDraw.Draw(mask).text((-left, -top), text, 255, font, how)
    return mask, left, top


def _paint(brush: ImageDraw.ImageDraw, item: Field | Mark | Stroke) -> None:
    colour = TONES[item.tone]
    if isinstance(item, Field):
        corner = ((item.x + item.width) * FINE, (item.y + item.height) * FINE)
        brush.rectangle(((item.x * FINE, item.y * FINE), corner), fill=colour)
    elif isinstance(item, Mark):
        points = [(x * FINE, y * FINE) for x, y in item.points]
        filling = colour if item.filled else SURFACE
        # The outline as a line: a polygon with a wide one is drawn over a mask of the whole image.
        brush.polygon(points, fill=filling)
        brush.line([*points, *points[:2]], colour, round(1.3 * FINE), "curve")
    else:
        width = max(1, round(item.width * FINE))
        for points in _dashed(item):
            brush.line([(x * FINE, y * FINE) for x, y in points], colour, width)


def _dashed(stroke: Stroke) -> list[list[tuple[float, float]]]:
    """Return the pieces of a stroke that are drawn."""
    if not stroke.dashes:
        return [list(stroke.points)]
    pieces: list[list[tuple[float, float]]] = []
    place, left = 0, stroke.dashes[0]
    for (x, y), (to_x, to_y) in zip(stroke.points, stroke.points[1:], strict=False):
        length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
        done = 0.0
        while length - done > 1e-9:
            step = min(left, length - done)
            if place % 2 == 0:
                ends = [(done + part) / length for part in (0.0, step)]
                pieces.append([(x + e * (to_x - x), y + e * (to_y - y)) for e in ends])
            done, left = done + step, left - step
            if left <= 1e-9:
                place += 1
                left = stroke.dashes[place % len(stroke.dashes)]
    return pieces


@cache
def _fonts() -> Path:
    """Return the folder of matplotlib's own fonts; importing it takes too long for that."""
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "reports need matplotlib, whose fonts their figures are written in"
        )
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"


@lru_cache(maxsize=32)
def _font(size: float, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(
        _fonts() / name,
        round(size * FINE),
        layout_engine=ImageFont.Layout.BASIC,
    )
