"""The verdicts of a group as pictures: of each figure, every row's difference from the baseline.

The numbers are those of the tables of verdicts (`reports.evidence`): on the same samples, with
95 % intervals. The band is what counts as equivalent, a loss or gain below 3 % of the baseline's
figure; a divergence has none, since the baseline's own is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reports import stats, words
from reports.blocks import Block, Interval, Intervals
from reports.evidence import title_of
from reports.rows import Group
from reports.summary import summary_columns
from reports.verdicts import Judgement, judge

MOST, DRAWN = 60, 40
"""Lines that one picture may have; of more rows so many are drawn."""

LEGEND = (
    "Each line: the difference from the baseline on the same samples, its 95 % interval, and the "
    "verdict, for which p is corrected over all rows. Shaded: what counts as equivalent (within "
    f"{100 * stats.ACCEPTABLE:g} % of the baseline's figure). Triangles: better (up), worse "
    "(down); filled diamond: equivalent or identical; octagon: differs; hollow: not told apart."
)


def interval_blocks(group: Group) -> list[Block]:
    """Return the block of pictures of the group's verdicts, none where nothing was tested."""
    judged = judge(group)
    columns = [found for key in summary_columns(group) if (found := judged.of(*key))]
    pictures = tuple(drawn for column in columns if (drawn := _picture(group, column)))
    if not pictures:
        return []
    return [Block("Differences from the baseline", (), pictures, (), LEGEND)]


def _picture(group: Group, column: Sequence[Judgement]) -> Intervals | None:
    first = column[0]
    unit, factor = _unit(first)
    shown = [one for one in column if not math.isnan(one.comparison.difference)]
    if not shown:
        return None
    what = title_of(first.value)
    protocol = first.value.protocol
    caption = f"{what} ({protocol}), difference from the baseline with its 95 % interval."
    if len(shown) > MOST:
        chosen = sorted(shown, key=lambda one: abs(one.comparison.difference))[:DRAWN]
        caption += (
            f" Drawn are the {DRAWN} of {len(shown)} rows that are closest to the baseline; "
            "comparisons.csv has all."
        )
        drawn = {one.row.record.cell for one in chosen}
        shown = [one for one in shown if one.row.record.cell in drawn]
    lines = tuple(_line(one, factor) for one in shown)
    worse = "left" if first.comparison.higher_is_better else "right"
    counts = words.count(len(lines), "row")
    return Intervals(
        "intervals",
        f"Differences in {what} ({protocol}) of {counts} of {group.title} from the baseline, with "
        "intervals and verdicts",
        caption,
        f"{what}: difference from the baseline{f', {unit}' if unit else ''} ({worse} is worse)",
        lines,
        _margin(shown, factor),
    )


def _line(one: Judgement, factor: float) -> Interval:
    made = one.comparison
    difference, low, high = (factor * x for x in (made.difference, made.low, made.high))
    return Interval(one.row.label, difference, low, high, one.word)


def _unit(one: Judgement) -> tuple[str, float]:
    """Return the unit that differences are drawn in, and what they are multiplied by for it."""
    if one.scale != "linear":
        return "%", 100.0
    if words.kind(one.value.metric) in ("share", "agreement"):
        return "points", 100.0
    return one.value.unit, 1.0


def _margin(column: Sequence[Judgement], factor: float) -> float | None:
    """Return the difference that counts as none; None where rows have no one such difference.

    A divergence has none: 3 % of the baseline's own are 0, or its noise.
    """
    if column[0].scale != "linear":
        return factor * stats.ACCEPTABLE
    figures = {one.comparison.second for one in column}
    if (
        len(figures) > 1
        or not column[0].comparison.higher_is_better
        or any(one.comparison.loss is None for one in column)
    ):
        return None
    return factor * stats.ACCEPTABLE * abs(figures.pop())
