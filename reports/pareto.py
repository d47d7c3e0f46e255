"""Quality against a cost, and which rows no other row beats in both.

Quality is the perplexity; of encoders, which have none, the distance of the embeddings from the
unquantized model's (1 - cosine). Of both less is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.record import Value
from reports import words
from reports.rows import Group, Row

NO_DISTANCE = 1e-9
"""1 - cosine below which two vectors are the same."""


@dataclass(frozen=True)
class Point:
    """A row in a figure of quality (y) against something (x)."""

    row: Row
    x: float
    y: float
    best: bool


@dataclass(frozen=True)
class Plane:
    """Quality against one metric, each under one protocol, for the rows that have both.

    `best` points are those no other row beats in both; `left_out` names the rows that have both
    figures but one that cannot be drawn. `quality` is `perplexity` or `embedding_distance`, and
    `perplexity_protocol` its protocol.
    """

    metric: str
    protocol: str
    perplexity_protocol: str
    higher_is_better: bool
    points: tuple[Point, ...]
    left_out: tuple[str, ...]
    quality: str = "perplexity"


def plane(group: Group, metric: str) -> Plane | None:
    """Return quality against `metric` for the rows of `group`, None where fewer than two."""
    protocol = group.main_protocol(metric)
    name, measured = "perplexity", "perplexity"
    if group.main_protocol(measured) is None:
        name, measured = "embedding_distance", "embedding_cosine"
    quality = group.main_protocol(measured)
    if protocol is None or quality is None:
        return None
    pairs: list[tuple[Row, Value, Value]] = []
    for row in group.rows:
        x, y = row.get(metric, protocol), row.get(measured, quality)
        if row.measured and x is not None and y is not None:
            pairs.append((row, x, y if name == measured else _distance(y)))
    drawn = [(row, x, y) for row, x, y in pairs if _drawable(x.value) and _drawable(y.value)]
    if len(drawn) < 2:
        return None
    higher = bool(drawn[0][1].higher_is_better)
    sign = -1.0 if higher else 1.0
    front = pareto([(sign * x.value, y.value) for _, x, y in drawn])
    points = tuple(
        Point(row, x.value, y.value, on_front)
        for (row, x, y), on_front in zip(drawn, front, strict=True)
    )
    left_out = tuple(
        f"{row.label} ({words.title(name).lower()} {words.figure(name, y.value)})"
        for row, x, y in pairs
        if not (_drawable(x.value) and _drawable(y.value))
    )
    return Plane(metric, protocol, quality, higher, points, left_out, name)


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each point whether none other is as small in both and smaller in one."""
    front = [False] * len(points)
    lowest, lowest_x = math.inf, math.inf
    for x, y, index in sorted((x, y, index) for index, (x, y) in enumerate(points)):
        if y < lowest or (y == lowest and x == lowest_x):
            front[index] = True
            lowest, lowest_x = y, x
    return front


def _distance(cosine: Value) -> Value:
    """Return 1 - cosine; what is left of rounding counts as 0."""
    distance = 1 - cosine.value
    return replace(cosine, value=0.0 if distance < NO_DISTANCE else distance)


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def alternative(plane: Plane) -> str:
    """Return what the figure is, in one line, for who does not see it."""
    return (
        f"{words.title(plane.quality)} against {words.title(plane.metric).lower()}, one point a row"
    )


def caption(plane: Plane) -> str:
    """Return what the figure shows and which rows it leaves out."""
    text = (
        f"{words.title(plane.quality)} ({plane.perplexity_protocol}) against "
        f"{words.title(plane.metric).lower()} ({plane.protocol}). Filled markers on the dashed "
        "line: no other row is better in both. Hollow: another row is. Star: the baseline."
    )
    if plane.left_out:
        text += f" Not drawn: {'; '.join(plane.left_out)}."
    return text
