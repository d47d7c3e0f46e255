"""How small charts and differences with intervals are laid out, as plain drawings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from reports import words
from reports.blocks import Interval, Intervals, Line, Panels
from reports.drawing.palette import SERIES
from reports.drawing.scale import Scale, difference_scale, positive_scale
from reports.drawing.scenes import (
    WIDTH,
    Field,
    Item,
    Mark,
    Scene,
    Stroke,
    Words,
    shortened,
    text_width,
)

SMALL = 11.0
LINE_HEIGHT = 19
LABEL_WIDTH = 250
HEAD, FOOT = 8, 44

SIGNS: dict[str, tuple[str, str, bool]] = {
    "better": ("up", "good", True),
    "worse": ("down", "bad", True),
    "equivalent": ("diamond", "good", True),
    "identical": ("diamond", "good", True),
    "differs": ("octagon", "ink", True),
}
"""Verdict -> shape, tone, and whether the mark is filled; others are hollow octagons."""

COLUMNS, PANEL_HEIGHT, PANEL_HEAD, PANEL_FOOT, PANEL_LEFT = 4, 128, 26, 24, 62
STYLES = ("diamond", "square", "up", "down", "octagon", "bar", "left", "right")
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (2, 2), (8, 2, 2, 2), (3, 1), (10, 4))


def intervals(picture: Intervals) -> Scene:
    """Return the drawing of `picture`: a row a line, label, interval and verdict."""
    shown = [words.one_line(line.label) for line in picture.lines]
    left = min(LABEL_WIDTH, max(text_width(label) for label in shown)) + 14
    right = WIDTH - max(text_width(line.word) for line in picture.lines) - 24
    bottom = HEAD + LINE_HEIGHT * len(picture.lines)
    ends = [end for line in picture.lines for end in (line.low, line.high, line.difference)]
    estimates = [line.difference for line in picture.lines]
    scale = difference_scale(ends, estimates, picture.margin or 0.0)

    def across(value: float) -> float:
        return left + min(1.0, max(0.0, scale.place(value))) * (right - left)

    items: list[Item] = []
    if picture.margin:
        start, end = across(-picture.margin), across(picture.margin)
        items.append(Field(start, HEAD, end - start, bottom - HEAD, "tint"))
    for tick, text in _ticks(scale):
        tone = "muted" if tick == 0 else "grid"
        items.append(Stroke(((across(tick), HEAD), (across(tick), bottom)), tone))
        items.append(Words(across(tick), bottom + 15, text, "muted", SMALL, "middle"))
    for place, (line, label) in enumerate(zip(picture.lines, shown, strict=True)):
        middle = HEAD + LINE_HEIGHT * (place + 0.5)
        name = shortened(label, LABEL_WIDTH)
        items.append(Words(left - 10, middle + 4, name, anchor="end"))
        items += _interval(line, middle, (left, right), (across(line.low), across(line.high)))
        if math.isfinite(line.difference):
            # Of hundreds of lines a title weighs: it stands only where the name is cut.
            title = label if name != label else ""
            items.append(_sign(line.word, across(line.difference), middle, title))
        items.append(Words(right + 12, middle + 4, line.word))
    beyond = f"; logarithmic beyond ±{scale.even:.3g}"
    items.append(
        Words(
            (left + right) / 2,
            bottom + 34,
            picture.across + ("" if scale.linear else beyond),
            anchor="middle",
        )
    )
    return Scene(bottom + FOOT, tuple(items))


def _interval(
    line: Interval, middle: float, edges: tuple[float, float], ends: tuple[float, float]
) -> Iterator[Item]:
    """Yield the whisker of a line; an end that is endless is dashed up to the edge."""
    known = [end for end, value in zip(ends, (line.low, line.high), strict=True) if _finite(value)]
    if len(known) < 2:
        yield Stroke((*[(edge, middle) for edge in edges],), "muted", 1.0, (2, 4))
        return
    yield Stroke(((ends[0], middle), (ends[1], middle)), "ink", 1.6)
    for end in ends:
        yield Stroke(((end, middle - 3.5), (end, middle + 3.5)), "ink", 1.6)


def _sign(word: str, x: float, y: float, title: str) -> Mark:
    shape, tone, filled = SIGNS.get(word, ("octagon", "muted", False))
    return Mark(x, y, shape, tone, 4.0, filled, title)


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _ticks(scale: Scale) -> list[tuple[float, str]]:
    return [
        (tick, f"{tick:,.0f}" if 1e3 <= abs(tick) < 1e6 else f"{tick:.3g}")
        for tick in scale.ticks()
    ]


def panels(picture: Panels) -> Scene:
    """Return the drawing of `picture`: charts in rows of `COLUMNS`, the legend above them."""
    labels = list(dict.fromkeys(line.label for panel in picture.panels for line in panel.lines))
    labels.sort(key=lambda label: (label == "per channel", words.natural(label)))
    styles = {label: place for place, label in enumerate(labels)}
    every = [
        point
        for lines in (*(panel.lines for panel in picture.panels), picture.points)
        for line in lines
        for point in line.points
    ]
    levels = [picture.level[1]] if picture.level else []
    up = positive_scale([*(y for _, y in every), *levels])
    widths = sorted({x for panel in picture.panels for line in panel.lines for x, _ in line.points})
    across = positive_scale([*(x for x, _ in every), widths[0] * 0.9, widths[-1] * 1.1])
    legend, top = _legend(styles, picture)
    items: list[Item] = [*legend]
    wide = (WIDTH - PANEL_LEFT) / COLUMNS
    step = PANEL_HEAD + PANEL_HEIGHT + PANEL_FOOT
    places = [divmod(place, COLUMNS) for place in range(len(picture.panels))]
    for (row, column), panel in zip(places, picture.panels, strict=True):
        corner = (PANEL_LEFT + wide * column, top + step * row + PANEL_HEAD)
        frame = _Frame(corner, (wide - 12, PANEL_HEIGHT), across, up)
        items += frame.axes(panel.title, widths, column == 0)
        if picture.level:
            items += frame.level(picture.level[1])
        for line in panel.lines:
            items += frame.line(line, styles[line.label])
    rows = places[-1][0] + 1
    if picture.points:
        # The names of points need the room of two charts.
        row, column = divmod(len(places), COLUMNS)
        row, column = (row, column) if column <= COLUMNS - 2 else (row + 1, 0)
        corner = (PANEL_LEFT + wide * column, top + step * row + PANEL_HEAD)
        frame = _Frame(corner, (2 * wide - 12, PANEL_HEIGHT), across, up)
        own = sorted({x for line in picture.points for x, _ in line.points})
        items += frame.axes(picture.apart, own, column == 0)
        if picture.level:
            items += frame.level(picture.level[1])
        items += frame.points(picture.points)
        rows = row + 1
    height = top + step * rows + 14
    items.append(
        Words(
            (WIDTH + PANEL_LEFT) / 2,
            height - 6,
            _words_of(picture.across, across),
            "muted",
            SMALL,
            "middle",
        )
    )
    return Scene(height, tuple(items))


def _words_of(name: str, scale: Scale) -> str:
    return name if scale.linear else f"{name} (logarithmic)"


def _legend(styles: dict[str, int], picture: Panels) -> tuple[list[Item], float]:
    """Return what each line is, and how much height that takes."""
    items: list[Item] = []
    x, y = 8.0, 18.0
    for label, style in styles.items():
        length = 34 + text_width(label) + 18
        if x + length > WIDTH:
            x, y = 8.0, y + 18
        tone = f"series-{style % len(SERIES)}"
        items.append(Stroke(((x, y - 4), (x + 26, y - 4)), tone, 1.6, DASHES[style % len(DASHES)]))
        items.append(Mark(x + 13, y - 4, STYLES[style % len(STYLES)], tone, 3.4))
        items.append(Words(x + 34, y, label))
        x += length
    text = f"up: {picture.up}"
    if picture.level:
        text += f"; dashed across: {picture.level[0]}"
    items.append(Words(8, y + 20, text, "muted", SMALL))
    return items, y + 26


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


class _Frame:
    """One small chart: where it stands, and its scales."""

    def __init__(
        self, corner: tuple[float, float], size: tuple[float, float], across: Scale, up: Scale
    ) -> None:
        self._corner, self._size, self._across, self._up = corner, size, across, up

    def _spot(self, x: float, y: float) -> tuple[float, float]:
        (left, top), (wide, tall) = self._corner, self._size
        return left + wide * self._across.place(x), top + tall * (1 - self._up.place(y))

    def axes(self, title: str, widths: Sequence[float], first: bool) -> Iterator[Item]:
        """Yield title, grid and numbers; those of the height stand at the `first` of a row."""
        (left, top), (wide, tall) = self._corner, self._size
        yield Words(left, top - 9, shortened(words.one_line(title), wide), bold=True)
        for tick, text in _ticks(self._up):
            _, y = self._spot(self._across.high, tick)
            yield Stroke(((left, y), (left + wide, y)), "grid")
            if first:
                yield Words(left - 6, y + 4, text, "muted", SMALL, "end")
        after = -math.inf
        for width in widths:
            x, _ = self._spot(width, self._up.high)
            yield Stroke(((x, top + tall), (x, top + tall + 3)), "muted")
            if x - after > text_width(words.bits(width), SMALL) + 4:
                yield Words(x, top + tall + 15, words.bits(width), "muted", SMALL, "middle")
                after = x
        yield Stroke(((left, top), (left, top + tall), (left + wide, top + tall)), "muted")

    def level(self, value: float) -> Iterator[Item]:
        """Yield a line across at `value`."""
        (left, _), (wide, _) = self._corner, self._size
        _, y = self._spot(self._across.high, value)
        yield Stroke(((left, y), (left + wide, y)), "ink", 1.0, (5, 4))

    def line(self, line: Line, style: int) -> Iterator[Item]:
        """Yield the points of `line`, joined."""
        spots = tuple(self._spot(x, y) for x, y in line.points)
        tone = f"series-{style % len(SERIES)}"
        if len(spots) > 1:
            yield Stroke(spots, tone, 1.4, DASHES[style % len(DASHES)])
        for x, y in spots:
            yield Mark(x, y, STYLES[style % len(STYLES)], tone, 3.2, True, line.label)

    def points(self, lines: Sequence[Line]) -> Iterator[Item]:
        """Yield the points of `lines`, each with its name beside it where that covers nothing.

        In a crowd the others have no name but on hovering.
        """
        (left, _), (wide, _) = self._corner, self._size
        spots = [(line.label, *self._spot(*line.points[0])) for line in lines]
        taken = [(x - 4, y - 4, x + 4, y + 4) for _, x, y in spots]
        for label, x, y in sorted(spots, key=lambda spot: spot[2]):
            yield Mark(x, y, "diamond", "ink", 3.2, True, label)
            text = words.one_line(label)
            length = text_width(text, SMALL)
            for start, anchor in ((x + 7, "start"), (x - 7 - length, "end")):
                box = (start, y - SMALL / 2, start + length, y + SMALL / 2)
                inside = left <= box[0] and box[2] <= left + wide
                if inside and not any(_meet(box, other) for other in taken):
                    taken.append(box)
                    yield Words(
                        x + (7 if anchor == "start" else -7), y + 4, text, size=SMALL, anchor=anchor
                    )
                    break


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
