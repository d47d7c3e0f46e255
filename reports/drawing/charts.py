"""Pictures of blocks that matplotlib draws: maps of layers x modules in greys, lines over steps.

One drawing gives a PNG and an SVG for the page. The shades of a map carry
their own contrast and stay as they are in a dark page; lines differ in dashes and markers too.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from reports import words
from reports.blocks import Curves, Map
from reports.drawing.palette import GRID, INK, MUTED, SERIES, SURFACE, VARIABLES, Drawing
from reports.drawing.scale import LOG_FROM
from reports.drawing.svg import for_page

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
WIDTH_INCHES, DPI = 7.6, 150
PACKED = {"compress_level": 4}
"""How hard a PNG is packed: a quarter larger than at most, in half the time."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quantbench",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
}

LIGHT, DARK = (0.953, 0.965, 0.976), (0.043, 0.176, 0.290)
"""Red, green and blue of the shades 0 and 1; between them brightness falls evenly."""

WHITE_FROM = 0.63
"""Shade from which white letters stand out more than black ones: either has a contrast of 4.5."""

DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    *("-", "--", ":", "-."),
    *((0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (7, 3))),
)
ROW_INCHES, MANY_ROWS_INCHES, MANY_ROWS = 0.32, 0.2, 40
LONGEST_LABEL = 46


def draw(picture: Map | Curves) -> Drawing:
    """Draw `picture`; its name stands before every id of the SVG, which shares a page."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # A name may hold letters that the font of the PNG lacks; the SVG uses the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = _map(picture) if isinstance(picture, Map) else _curves(picture)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs=PACKED)
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Drawing(png.getvalue(), for_page(svg.getvalue(), {}, picture.name, VARIABLES))


def _map(picture: Map) -> Figure:
    count = len(picture.rows)
    inches = MANY_ROWS_INCHES if count > MANY_ROWS else ROW_INCHES
    size = 7.0 if count > MANY_ROWS else 8.5
    above, below = 0.62, 0.08
    height = above + below + inches * count
    left = 0.35 + 0.075 * max(map(len, picture.rows), default=0)
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=100, facecolor=SURFACE)
    frame = (left / WIDTH_INCHES, below / height, 1 - (left + 0.1) / WIDTH_INCHES)
    axes = figure.add_axes((*frame, inches * count / height), facecolor="none")
    for (row, column), spot in picture.spots.items():
        shade = min(1.0, max(0.0, spot.shade))
        colour = tuple(a + (b - a) * shade for a, b in zip(LIGHT, DARK, strict=True))
        axes.add_patch(
            Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="#8a94a0", lw=0.6)
        )
        axes.text(
            column + 0.5,
            row + 0.5,
            words.one_line(spot.text),
            ha="center",
            va="center_baseline",
            fontsize=size,
            color="#000000" if shade < WHITE_FROM else "#ffffff",
        )
    _name(axes, picture)
    return figure


def _name(axes: Axes, picture: Map) -> None:
    """Name the rows and columns of a map, the first row on top."""
    axes.set_xlim(0, max(1, len(picture.columns)))
    axes.set_ylim(max(1, len(picture.rows)), 0)
    axes.xaxis.tick_top()
    columns = [words.one_line(name).replace(".", ".\n", 1) for name in picture.columns]
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, fontsize=8.5)
    rows = [words.one_line(name) for name in picture.rows]
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows, fontsize=8.5)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _curves(picture: Curves) -> Figure:
    rows = (len(picture.lines) + 1) // 2
    height = 3.6 + 0.22 * rows
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=100, facecolor=SURFACE)
    bottom = 0.55 / height
    axes = figure.add_axes((0.105, bottom, 0.875, 3.0 / height), facecolor="none")
    for place, line in enumerate(picture.lines):
        label = words.one_line(line.label)
        axes.plot(
            [x for x, _ in line.points],
            [y for _, y in line.points],
            label=label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…",
            color=SERIES[place % len(SERIES)],
            linestyle=DASHES[place % len(DASHES)],
            marker=MARKERS[place % len(MARKERS)],
            markevery=max(1, len(line.points) // 8),
            markersize=4.5,
            linewidth=1.3,
        )
    axes.set_xlabel(picture.across)
    heights = [y for line in picture.lines for _, y in line.points if y > 0]
    # One row that begins far above the others would press them into one line.
    if heights and max(heights) / min(heights) > LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel(f"{picture.up} (logarithmic)")
    else:
        axes.set_ylabel(picture.up)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=2,
        frameon=False,
        fontsize=8.5,
        borderaxespad=0.2,
    )
    return figure
