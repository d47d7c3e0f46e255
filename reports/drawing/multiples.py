"""Quality over bits, a small chart a method, a line a group size, all of one scale.

Quality is the mean KL from the unquantized model; where no row has one, the perplexity. Methods
whose bits and group size cannot be chosen, and those measured at one choice alone, stand as points
in a chart of their own. Values that a logarithmic scale cannot show are named, not moved.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from reports import words
from reports.blocks import Block, Line, Panel, Panels
from reports.rows import Group, Row, main_protocol

QUALITIES = ("kl_mean", "perplexity", "masked_kl", "masked_perplexity")

Places = Mapping[int, Mapping[float, float]]
"""Group size -> bits -> the lowest value."""


def multiple_blocks(group: Group) -> list[Block]:
    """Return the block of quality over bits and group size; none where no method has a choice."""
    found = next((m for m in QUALITIES if main_protocol(group.measured, m)), None)
    protocol = None if found is None else main_protocol(group.measured, found)
    if found is None or protocol is None:
        return []
    rows = [row for row in group.measured if not row.is_baseline and row.get(found, protocol)]
    drawn = [row for row in rows if _drawable(row.values[found, protocol].value)]
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in drawn:
        if row.bits is not None and row.group_size is not None:
            by_method[row.method].append(row)
    chosen = {
        method: members
        for method, members in by_method.items()
        if len({(row.bits, row.group_size) for row in members}) > 1
    }
    if not chosen:
        return []
    panels = tuple(
        Panel(method, _lines(_places(members, found, protocol)))
        for method, members in sorted(chosen.items(), key=lambda item: words.natural(item[0]))
    )
    apart = [row for row in drawn if row.method not in chosen and _bits(row)]
    left_out = [row for row in rows if not _drawable(row.values[found, protocol].value)]
    return [
        Block(
            "Bits and group size",
            (),
            (_picture(group, (found, protocol), panels, apart, left_out),),
        )
    ]


def _picture(
    group: Group,
    measured: tuple[str, str],
    panels: tuple[Panel, ...],
    apart: Sequence[Row],
    left_out: Sequence[Row],
) -> Panels:
    metric, protocol = measured
    base = next((b.get(metric, protocol) for b in group.baselines), None)
    level = None
    if base is not None and _drawable(base.value):
        level = ("baseline", base.value)
    title = words.title(metric)
    caption = (
        f"{title} ({protocol}) over the bits of a weight, a chart a method, a line a group size; "
        "down is better. All charts have the same scales. Of rows of equal bits and group size "
        "that differ in other options the lowest is drawn; of points in a crowd some have no name."
    )
    if left_out:
        named = "; ".join(
            f"{row.label} ({words.figure(metric, row.values[metric, protocol].value)})"
            for row in left_out
        )
        caption += f" Not drawn on a logarithmic scale: {named}."
    return Panels(
        "multiples",
        f"{title} of {group.title} over bits, one small chart for each of "
        f"{words.listed([panel.title for panel in panels])}, one line a group size",
        caption,
        "bits",
        title,
        panels,
        "without a choice",
        tuple(
            Line(row.label, ((_bits(row), row.values[metric, protocol].value),)) for row in apart
        ),
        level,
    )


def _bits(row: Row) -> float:
    """Return the bits of a weight: the chosen ones, else those stored; 0 where none are known."""
    if row.bits is not None:
        return row.bits
    stored = [*row.all_of("bits_per_weight"), *row.all_of("computed_bits_per_weight")]
    return stored[0].value if stored else 0.0


def _places(rows: Sequence[Row], metric: str, protocol: str) -> Places:
    found: dict[int, dict[float, float]] = defaultdict(dict)
    for row in rows:
        if row.bits is not None and row.group_size is not None:
            value = row.values[metric, protocol].value
            of_size = found[row.group_size]
            of_size[row.bits] = min(value, of_size.get(row.bits, value))
    return found


def _lines(found: Places) -> tuple[Line, ...]:
    # Per channel is the largest group.
    sizes = sorted(found, key=lambda size: (size == -1, size))
    return tuple(
        Line(
            "per channel" if size == -1 else f"groups of {size}",
            tuple(sorted(found[size].items())),
        )
        for size in sizes
    )


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0
