"""Figures: perplexity against size and against decode speed, with the Pareto front.

One drawing gives a PNG (opaque, for Markdown) and an SVG whose colours are CSS variables of the
page it is put into, so that it follows the page's light or dark theme. Rows are told apart by
label, marker shape and colour; the front by filled markers and a dashed line.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from reports import words
from reports.pareto import Plane, Point

INK, MUTED, GRID, SURFACE = "#1b1f25", "#59616d", "#e1e5ea", "#fefefe"
SERIES = (
    *("#1767a8", "#b8420e", "#14773b", "#7a3aa5"),
    *("#8a5a06", "#b3174f", "#0c6f6a", "#4a5568"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
BASELINE_MARKER = "*"

WIDTH_INCHES, HEIGHT_INCHES, DPI = 7.6, 4.4, 150
LABEL_POINTS = 9.0
DISTANCES = (9, 16, 26, 38, 52, 68, 86, 106, 130)
"""Pixels from a point at which a place for its label is looked for."""

MOST_LABELS = 40
LOG_FROM = 3.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""

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


@dataclass(frozen=True)
class Drawing:
    """One figure in both forms."""

    png: bytes
    svg: str


def draw(plane: Plane, anchors: Mapping[str, str], prefix: str) -> Drawing:
    """Draw `plane`.

    Args:
        plane: the points.
        anchors: by cell, the id of the row that a point of the SVG links to.
        prefix: put before every id of the SVG, which shares a page with others.
    """
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # A name may hold letters that the font of the PNG lacks; the SVG uses the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = _figure(plane, anchors)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    titles = {anchors[point.row.record.cell]: _title(plane, point) for point in plane.points}
    return Drawing(png.getvalue(), for_page(svg.getvalue(), titles, prefix))


def alternative(plane: Plane) -> str:
    """Return what the figure is, in one line, for who does not see it."""
    return f"{_quality(plane)} against {words.title(plane.metric).lower()}, one point a row"


def caption(plane: Plane) -> str:
    """Return what the figure shows and which rows it leaves out."""
    text = (
        f"{_quality(plane)} ({plane.perplexity_protocol}) against "
        f"{words.title(plane.metric).lower()} ({plane.protocol}). Filled markers on the dashed "
        "line: no other row is better in both. Hollow: another row is. Star: the baseline."
    )
    if plane.left_out:
        text += f" Not drawn: {'; '.join(plane.left_out)}."
    return text


def _quality(plane: Plane) -> str:
    return words.title(plane.quality)


def _figure(plane: Plane, anchors: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=100, facecolor=SURFACE)
    axes = figure.add_axes((0.105, 0.125, 0.875, 0.855), facecolor="none")
    _scale(axes, plane)
    _draw_front(axes, plane)
    methods = sorted({p.row.method for p in plane.points if not p.row.is_baseline})
    alike: dict[tuple[bool, int], list[Point]] = defaultdict(list)
    for point in plane.points:
        place = methods.index(point.row.method) if not point.row.is_baseline else -1
        alike[point.best, place].append(point)
    # The front's markers lie on top of the others.
    for (best, place), points in sorted(alike.items(), key=lambda item: item[0]):
        colour = SERIES[place % len(SERIES)] if place >= 0 else INK
        marks = axes.scatter(
            [point.x for point in points],
            [point.y for point in points],
            s=110 if place < 0 else 38,
            marker=MARKERS[place % len(MARKERS)] if place >= 0 else BASELINE_MARKER,
            facecolors=colour if best else SURFACE,
            edgecolors=colour,
            linewidths=1.3,
            zorder=3,
        )
        marks.set_urls([f"#{anchors[point.row.record.cell]}" for point in points])
    figure.draw_without_rendering()
    _label(axes, plane)
    return figure


def _scale(axes: Axes, plane: Plane) -> None:
    """Set scales, limits, ticks and the names of the axes."""
    for name, metric, protocol, values in (
        ("x", plane.metric, plane.protocol, [point.x for point in plane.points]),
        ("y", plane.quality, plane.perplexity_protocol, [point.y for point in plane.points]),
    ):
        axis = axes.xaxis if name == "x" else axes.yaxis
        low, high = min(values), max(values)
        logarithmic = high / low > LOG_FROM
        if logarithmic:
            margin = (high / low) ** 0.1
            limits = (low / margin, high * margin)
        else:
            margin = 0.1 * (high - low) or 0.05 * high
            limits = (low - margin, high + margin)
        if name == "x":
            axes.set_xscale("log" if logarithmic else "linear")
            axes.set_xlim(*limits)
        else:
            axes.set_yscale("log" if logarithmic else "linear")
            axes.set_ylim(*limits)
        ticks = _ticks(limits, logarithmic)
        format_ = words.column_format(metric, ticks)
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(_tick_writer(format_)))
        unit = ", ".join(part for part in (format_.unit, "logarithmic" * logarithmic) if part)
        axis.set_label_text(f"{words.title(metric)}{f' ({unit})' if unit else ''}, {protocol}")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _ticks(limits: tuple[float, float], logarithmic: bool) -> list[float]:
    if logarithmic:
        for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)):
            ticks = _within(limits, LogLocator(subs=steps).tick_values(*limits))
            if len(ticks) >= 4:
                break
        return ticks
    return _within(limits, MaxNLocator(6).tick_values(*limits))


def _within(limits: tuple[float, float], ticks: Iterable[float]) -> list[float]:
    return [float(tick) for tick in ticks if limits[0] <= tick <= limits[1]]


def _tick_writer(format_: words.Format) -> Any:
    def write(value: float, _position: int) -> str:
        text = format_.write(value)
        return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text

    return write


def _front(plane: Plane) -> list[tuple[float, float]]:
    """Return the corners of the border of what was reached: no row lies on its better side."""
    best = sorted((point.x, point.y) for point in plane.points if point.best)
    corners = best[:1]
    for (before_x, before_y), (x, y) in pairwise(best):
        corners += [(before_x, y) if plane.higher_is_better else (x, before_y), (x, y)]
    return corners


def _draw_front(axes: Axes, plane: Plane) -> None:
    corners = _front(plane)
    axes.plot(
        [x for x, _ in corners],
        [y for _, y in corners],
        color=MUTED,
        linewidth=1.1,
        linestyle=(0, (4, 3)),
        zorder=2,
    )


Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


def _label(axes: Axes, plane: Plane) -> None:
    """Write each row's label beside its point, where it covers no other label and no point.

    In a crowd a label that finds no place is left out, but never one of the front's.
    """
    spots = axes.transData.transform([(point.x, point.y) for point in plane.points])
    frame = axes.get_window_extent()
    bounds = (frame.x0 + 2, frame.y0 + 2, frame.x1 + 12, frame.y1 + 8)
    width, height = axes.figure.bbox.width, axes.figure.bbox.height
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    front = axes.transData.transform(_front(plane))
    for (x, y), (other_x, other_y) in pairwise(front):
        taken.append(
            (min(x, other_x) - 2, min(y, other_y) - 2, max(x, other_x) + 2, max(y, other_y) + 2)
        )
    # Points on the front choose first; of a crowd, only they are named.
    order = sorted(range(len(plane.points)), key=lambda i: (not plane.points[i].best, i))
    for index in order[:MOST_LABELS]:
        point = plane.points[index]
        weight = "bold" if point.best else "normal"
        text = words.one_line(point.row.label)
        probe = Text(0, 0, text, fontsize=LABEL_POINTS, fontweight=weight, figure=axes.figure)
        extent = probe.get_window_extent()
        x, y = (float(v) for v in spots[index])
        size = (extent.width, extent.height)
        place = _place((x, y), size, taken, bounds, point.best or point.row.is_baseline)
        if place is None:
            continue
        box, far = place
        taken.append(box)
        if far:
            corner = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
            ends = axes.transData.inverted().transform([(x, y), corner])
            axes.plot(ends[:, 0], ends[:, 1], color=MUTED, linewidth=0.6, zorder=2.5)
        axes.annotate(
            text,
            (box[0] / width, (box[1] + box[3]) / 2 / height),
            xycoords="figure fraction",
            fontsize=LABEL_POINTS,
            fontweight=weight,
            va="center_baseline",
            color=INK if point.best else MUTED,
            zorder=4,
        )


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
    best: tuple[float, Box, bool] | None = None
    reach = (DISTANCES[-1] + size[0], DISTANCES[-1] + 2 * size[1])
    around = (spot[0] - reach[0], spot[1] - reach[1], spot[0] + reach[0], spot[1] + reach[1])
    taken = [other for other in taken if _overlap(around, other)]
    for distance in DISTANCES:
        for angle in (0, 45, -45, 180, 135, -135, 90, -90, 20, -20, 160, -160, 70, -70):
            box = _beside(spot, size, distance, math.radians(angle))
            covered = sum(_overlap(box, other) for other in taken) + _outside(box, bounds)
            if covered == 0:
                return box, distance > 16
            if must and (best is None or covered < best[0]):
                best = (covered, box, distance > 16)
    return None if best is None else best[1:]


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


def _outside(box: Box, bounds: Box) -> float:
    """Return by how much `box` leaves `bounds`, weighed as an overlap."""
    beyond = (bounds[0] - box[0], bounds[1] - box[1], box[2] - bounds[2], box[3] - bounds[3])
    return sum(max(0.0, part) for part in beyond) * 10


def _title(plane: Plane, point: Point) -> str:
    return (
        f"{point.row.label}: {words.figure(plane.metric, point.x)}, "
        f"{_quality(plane).lower()} {words.figure(plane.quality, point.y)}"
    )


def for_page(svg: str, titles: Mapping[str, str], prefix: str) -> str:
    """Return matplotlib's SVG as a page's element: own ids, the page's colours, titled links.

    `titles` are by the id that a link goes to; `prefix` is put before every id.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    own = set(re.findall(r'\bid="([^"]+)"', svg))

    def prefixed(match: re.Match[str]) -> str:
        before, name = match.groups()
        return f"{before}{prefix}-{name}" if name in own else match[0]

    def linked(match: re.Match[str]) -> str:
        return f'<a href="#{match[1]}"><title>{escape(titles[match[1]])}</title>'

    svg = re.sub(r'(\bid="|href="#|url\(#)([^")]+)', prefixed, svg)
    svg = re.sub(r'<a xlink:href="#([^"]+)"[^>]*>', linked, svg)
    for name, colour in _variables().items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()


def _variables() -> dict[str, str]:
    """Return the CSS variable that stands for each colour of a drawing."""
    series = {f"series-{index}": colour for index, colour in enumerate(SERIES)}
    return {"ink": INK, "muted": MUTED, "grid": GRID, "surface": SURFACE, **series}
