"""Figures: perplexity against size and against decode speed, with the Pareto front.

Rows are told apart by label, shape and colour; the front by filled marks and a dashed line. A mark
leads to its row in the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from reports import words
from reports.drawing.palette import SERIES, Drawing
from reports.drawing.scale import Scale, positive_scale
from reports.drawing.scenes import (
    WIDTH,
    Item,
    Mark,
    Scene,
    Stroke,
    Words,
    drawing,
    shortened,
    text_width,
)
from reports.pareto import Plane, Point

HEIGHT = 440
LEFT, RIGHT, TOP, BOTTOM = 62, 748, 26, 388
"""Edges of the field of points, in pixels from the upper left corner."""

SHAPES = ("circle", "square", "up", "diamond", "down", "bar", "left", "right")
LABEL_SIZE, LABEL_HEIGHT = 12.0, 12.0
DISTANCES = (9, 16, 26, 38, 52, 68, 86, 106, 130)
"""Pixels from a point at which a place for its label is looked for."""

ANGLES = (0, 45, -45, 180, 135, -135, 90, -90, 20, -20, 160, -160, 70, -70)
"""Degrees around a point, in the order in which they are tried at each distance."""

MOST_LABELS = 40

Array = npt.NDArray[np.float64]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels, upwards."""


def draw(plane: Plane, anchors: Mapping[str, str]) -> Drawing:
    """Draw `plane`; `anchors` are by cell, the id of the row that a point leads to."""
    return drawing(Scene(HEIGHT, tuple(_items(plane, anchors))))


def _items(plane: Plane, anchors: Mapping[str, str]) -> Iterator[Item]:
    across = positive_scale([point.x for point in plane.points])
    up = positive_scale([point.y for point in plane.points])

    def spot(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + across.place(x) * (RIGHT - LEFT),
            BOTTOM - up.place(y) * (BOTTOM - TOP),
        )

    yield from _grid(plane, across, up, spot)
    corners = tuple(spot(x, y) for x, y in _front(plane))
    yield Stroke(corners, "muted", 1.1, (4, 3))
    spots = [spot(point.x, point.y) for point in plane.points]
    labels, lines = _labels(plane, spots, corners)
    yield from lines
    methods = sorted({p.row.method for p in plane.points if not p.row.is_baseline})
    # The front's marks lie on top of the others.
    for point, (x, y) in sorted(
        zip(plane.points, spots, strict=True), key=lambda found: found[0].best
    ):
        shape, tone, size = "star", "ink", 6.0
        if not point.row.is_baseline:
            place = methods.index(point.row.method)
            # The ninth method has the first one's shape in another colour.
            colour = (place + 3 * (place // len(SHAPES))) % len(SERIES)
            shape, tone, size = SHAPES[place % len(SHAPES)], f"series-{colour}", 4.0
        link = f"#{anchors[point.row.record.cell]}"
        yield Mark(x, y, shape, tone, size, point.best, _title(plane, point), link)
    yield from labels


def _grid(
    plane: Plane, across: Scale, up: Scale, spot: Callable[[float, float], tuple[float, float]]
) -> Iterator[Item]:
    """Yield the grid with its numbers and the names of the axes."""
    ticks = across.ticks()
    format_ = words.column_format(plane.metric, ticks)
    for tick in ticks:
        x, _ = spot(tick, up.high)
        yield Stroke(((x, TOP), (x, BOTTOM)), "grid")
        yield Words(x, BOTTOM + 17, _plain(format_.write(tick)), "muted", anchor="middle")
    name = _axis_name(plane.metric, format_.unit, plane.protocol, across)
    yield Words((LEFT + RIGHT) / 2, BOTTOM + 40, name, anchor="middle")
    ticks = up.ticks()
    format_ = words.column_format(plane.quality, ticks)
    for tick in ticks:
        _, y = spot(across.high, tick)
        yield Stroke(((LEFT, y), (RIGHT, y)), "grid")
        text = shortened(_plain(format_.write(tick)), LEFT - 10)
        yield Words(LEFT - 6, y + 4, text, "muted", anchor="end")
    yield Words(6, 14, _axis_name(plane.quality, format_.unit, plane.perplexity_protocol, up))
    yield Stroke(((LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)), "muted")


def _axis_name(metric: str, unit: str, protocol: str, scale: Scale) -> str:
    said = ", ".join(part for part in (unit, "" if scale.linear else "logarithmic") if part)
    return f"{words.title(metric)}{f' ({said})' if said else ''}, {protocol}"


def _plain(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _front(plane: Plane) -> list[tuple[float, float]]:
    """Return the corners of the border of what was reached: no row lies on its better side."""
    best = sorted((point.x, point.y) for point in plane.points if point.best)
    corners = best[:1]
    for (before_x, before_y), (x, y) in pairwise(best):
        corners += [(before_x, y) if plane.higher_is_better else (x, before_y), (x, y)]
    return corners


def _labels(
    plane: Plane, spots: Sequence[tuple[float, float]], corners: Sequence[tuple[float, float]]
) -> tuple[list[Words], list[Stroke]]:
    """Return each row's label beside its point, and the lines to those that stand far from it.

    A label covers no other label and no point; where it has no place it is left out unless the
    row is on the front or the baseline.
    """
    flipped = [(x, HEIGHT - y) for x, y in spots]
    bounds = (LEFT + 2.0, HEIGHT - BOTTOM + 2.0, WIDTH - 2.0, HEIGHT - TOP + 6.0)
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in flipped]
    for (x, y), (other_x, other_y) in pairwise((x, HEIGHT - y) for x, y in corners):
        taken.append(
            (min(x, other_x) - 2, min(y, other_y) - 2, max(x, other_x) + 2, max(y, other_y) + 2)
        )
    labels, lines = [], []
    # Points on the front choose first; of a crowd, only they are named.
    order = sorted(range(len(plane.points)), key=lambda i: (not plane.points[i].best, i))
    for index in order[:MOST_LABELS]:
        point, (x, y) = plane.points[index], flipped[index]
        text = words.one_line(point.row.label)
        size = (round(text_width(text, LABEL_SIZE, point.best)), LABEL_HEIGHT)
        place = _place((x, y), size, taken, bounds, point.best or point.row.is_baseline)
        if place is None:
            continue
        box, far = place
        taken.append(box)
        if far:
            corner = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
            ends = ((x, HEIGHT - y), (corner[0], HEIGHT - corner[1]))
            lines.append(Stroke(ends, "muted", 0.6))
        tone = "ink" if point.best else "muted"
        labels.append(
            Words(box[0], HEIGHT - box[1] - 2, text, tone, LABEL_SIZE, "start", point.best)
        )
    return labels, lines


def _place(
    spot: tuple[float, float],
    size: tuple[float, float],
    taken: Sequence[Box],
    bounds: Box,
    must: bool,
) -> tuple[Box, bool] | None:
    """Return the box for a label of `size` near `spot`, and whether it needs a line to it.

    Of the places around the point, the nearest that covers nothing; failing all, None, or the one
    that covers least where the label `must` stand.
    """
    reach = (DISTANCES[-1] + size[0], DISTANCES[-1] + 2 * size[1])
    around = (spot[0] - reach[0], spot[1] - reach[1], spot[0] + reach[0], spot[1] + reach[1])
    others = np.array([other for other in taken if _overlap(around, other)]).reshape(-1, 4)
    boxes = _places(size) + np.array([*spot, *spot])
    covered = _overlaps(boxes, others) + _outside(boxes, bounds)
    free = covered == 0
    if not must and not free.any():
        return None
    # The first of the free ones, or of those that cover least.
    index = int(free.argmax() if free.any() else covered.argmin())
    left, bottom, right, top = (float(edge) for edge in boxes[index])
    return (left, bottom, right, top), DISTANCES[index // len(ANGLES)] > 16


@lru_cache(maxsize=512)
def _places(size: tuple[float, float]) -> Array:
    """Return the boxes of `size` around a point at 0, float64 [places, 4], the nearest first."""
    return np.array(
        [
            _beside((0.0, 0.0), size, distance, math.radians(angle))
            for distance in DISTANCES
            for angle in ANGLES
        ]
    )


def _overlaps(boxes: Array, others: Array) -> Array:
    """Return how much of each of `boxes`, [n, 4], lies on any of `others`, [m, 4]."""
    across = np.minimum(boxes[:, None, 2], others[:, 2]) - np.maximum(
        boxes[:, None, 0], others[:, 0]
    )
    up = np.minimum(boxes[:, None, 3], others[:, 3]) - np.maximum(boxes[:, None, 1], others[:, 1])
    return np.asarray((across.clip(0) * up.clip(0)).sum(axis=1))


def _beside(
    spot: tuple[float, float], size: tuple[float, float], distance: float, angle: float
) -> Box:
    """Return a box of `size` whose nearest side is about `distance` from `spot`."""
    across, up = math.cos(angle), math.sin(angle)
    width, height = size
    aside = math.copysign(width / 2, across) if abs(across) > 0.4 else 0.0
    centre_x = spot[0] + across * distance + aside
    centre_y = spot[1] + up * (distance + height / 2)
    left, bottom = centre_x - width / 2, centre_y - height / 2
    return (left, bottom, left + width, bottom + height)


def _overlap(a: Box, b: Box) -> float:
    across = min(a[2], b[2]) - max(a[0], b[0])
    up = min(a[3], b[3]) - max(a[1], b[1])
    return across * up if across > 0 and up > 0 else 0.0


def _outside(boxes: Array, bounds: Box) -> Array:
    """Return by how much each of `boxes`, [n, 4], leaves `bounds`, weighed as an overlap."""
    beyond = (np.array(bounds) - boxes) * np.array((1, 1, -1, -1))
    return np.asarray(beyond.clip(0).sum(axis=1) * 10)


def _title(plane: Plane, point: Point) -> str:
    return (
        f"{point.row.label}: {words.figure(plane.metric, point.x)}, "
        f"{words.title(plane.quality).lower()} {words.figure(plane.quality, point.y)}"
    )
