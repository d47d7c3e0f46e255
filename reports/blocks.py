"""Parts of a report beside the tables of rows: sentences, tables and pictures under one heading.

What a method or a job left in its records is turned into these (`reports.sensitivity`,
`reports.allocation`, `reports.training`, ...); Markdown and HTML lay all of them out alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from reports import words


@dataclass(frozen=True)
class Head:
    """The head of a column; a `numeric` one is aligned and sorted as numbers."""

    text: str
    unit: str = ""
    numeric: bool = False


@dataclass(frozen=True)
class Field:
    """One field of a table: its text, the number it sorts by, and its language if not English."""

    text: str
    value: float | None = None
    language: str = ""


@dataclass(frozen=True)
class Grid:
    """A table: its heads and lines; the first field of a line names it.

    `folded` ones are long and stand closed below their `title`.
    """

    title: str
    heads: tuple[Head, ...]
    lines: tuple[tuple[Field, ...], ...]
    folded: bool = False


@dataclass(frozen=True)
class Spot:
    """One cell of a `Map`: its text, and its shade from 0 (light) to 1 (dark)."""

    text: str
    shade: float


@dataclass(frozen=True)
class Map:
    """A picture of layers x modules: shades of grey with the figures written into them.

    `spots` are by (row, column). `name` begins the names of files and ids.
    """

    name: str
    alternative: str
    caption: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    spots: dict[tuple[int, int], Spot]


@dataclass(frozen=True)
class Line:
    """One line of `Curves`: its label and its points (x, y)."""

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Curves:
    """A picture of lines over one horizontal axis."""

    name: str
    alternative: str
    caption: str
    across: str
    up: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Panel:
    """One of several small charts of one scale: its title and lines of points (x, y)."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Panels:
    """Small charts in rows, all of the same scales.

    Lines of one label look alike in all of them. `points` have a label each and stand in a chart
    of their own, `apart`; `level` is drawn across all of them as a line with its label.
    """

    name: str
    alternative: str
    caption: str
    across: str
    up: str
    panels: tuple[Panel, ...]
    apart: str = ""
    points: tuple[Line, ...] = ()
    level: tuple[str, float] | None = None


@dataclass(frozen=True)
class Interval:
    """One line of `Intervals`: a difference with its interval, and the verdict as a word."""

    label: str
    difference: float
    low: float
    high: float
    word: str


@dataclass(frozen=True)
class Intervals:
    """A picture of differences from 0, a line each; within `margin` they count as none."""

    name: str
    alternative: str
    caption: str
    across: str
    lines: tuple[Interval, ...]
    margin: float | None = None


Picture = Map | Curves | Panels | Intervals


@dataclass(frozen=True)
class Block:
    """What stands under one heading: sentences, pictures, tables, then a legend."""

    title: str
    sentences: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    grids: tuple[Grid, ...] = ()
    legend: str = ""


def named(blocks: list[Block], slug: str) -> tuple[Block, ...]:
    """Return `blocks` with pictures whose names end in `slug`, each its own."""
    count: dict[str, int] = {}
    found = []
    for block in blocks:
        pictures = []
        for picture in block.pictures:
            count[picture.name] = number = count.get(picture.name, 0) + 1
            name = f"{picture.name}-{slug}" + (f"-{number}" if number > 1 else "")
            pictures.append(replace(picture, name=name))
        found.append(replace(block, pictures=tuple(pictures)))
    return tuple(found)


def number(metric: str, value: float | None, absent: str = words.UNKNOWN) -> Field:
    """Return a field of one figure with its unit, `absent` where there is none."""
    return Field(absent) if value is None else Field(words.figure(metric, value), value)


def plain(value: float | None, absent: str = words.UNKNOWN) -> Field:
    """Return a field of a plain number."""
    if value is None:
        return Field(absent)
    text = words.spell(value, words.significant)
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    return Field(text, value)


def share(value: float | None, absent: str = words.UNKNOWN) -> Field:
    """Return a field of a share in percent."""
    if value is None or not math.isfinite(value):
        return Field(absent)
    return Field(f"{100 * value:.1f} %", value)


def mean(values: list[float]) -> float:
    """Return the mean of `values`, which are not empty."""
    return sum(values) / len(values)
