"""Which methods of equal bits the same text can tell apart, by `reports.stats`.

Rows of equal bits and group size read the same windows, so each window gives one difference of
mean negative log-likelihood. Every pair of them is compared; p-values are Holm's over all pairs of
the group. Rows whose difference is not told from chance are not ranked.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TypeGuard

from reports import stats, words
from reports.bootstrap import FEWEST
from reports.rows import Group, Row, axes_label
from reports.stats import Comparison
from reports.verdicts import pair

LEVEL = 0.05
"""Of the corrected tests."""

MOST = 16
"""Rows of one bits and group size that are compared, the lowest perplexities first: pairs grow with
the square of their number, and so does what the correction takes from each."""


@dataclass(frozen=True)
class Difference:
    """Two rows on the same windows, and the comparison's p corrected for all pairs."""

    first: Row
    second: Row
    comparison: Comparison
    p_holm: float

    @property
    def told_apart(self) -> bool:
        """Whether the difference is more than chance."""
        return self.p_holm < LEVEL


@dataclass(frozen=True)
class Alike:
    """Rows of one bits and group size, by perplexity, and how each pair differs.

    `left_out` is the number of rows whose perplexity is higher still.
    """

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    windows: int
    left_out: int

    @property
    def title(self) -> str:
        """What the rows share."""
        bits, size = self.rows[0].bits, self.rows[0].group_size
        group = "" if size is None else ", per channel" if size == -1 else f", groups of {size}"
        return f"{bits:.3g} bits{group}"


def compare(group: Group) -> list[Alike]:
    """Return the comparisons that the perplexities of `group` allow, most bits first."""
    protocol = group.main_protocol("perplexity")
    if protocol is None:
        return []
    sets: dict[tuple[float, int], list[Row]] = defaultdict(list)
    for row in group.measured:
        value = row.get("perplexity", protocol)
        if value is None or row.bits is None or row.is_baseline:
            continue
        if all(map(math.isfinite, value.samples)):
            # Rows without groups are compared among themselves.
            sets[row.bits, row.group_size or 0].append(row)
    found: list[tuple[list[Row], list[tuple[Row, Row, Comparison]]]] = []
    for _, members in sorted(sets.items(), key=lambda item: (-item[0][0], item[0][1])):
        ordered = sorted(members, key=lambda row: row.values["perplexity", protocol].value)
        pairs = [
            (first, second, pair(first, second, "perplexity", protocol))
            for first, second in combinations(ordered[:MOST], 2)
        ]
        # Where one pair cannot be compared, nothing can be said of the others' order.
        whole = [(a, b, made) for a, b, made in pairs if _tested(made)]
        if whole and len(whole) == len(pairs):
            found.append((ordered, whole))
    adjusted = iter(stats.holm([one.p for _, pairs in found for *_, one in pairs]))
    return [
        Alike(
            tuple(rows[:MOST]),
            tuple(Difference(*one, next(adjusted)) for one in pairs),
            pairs[0][2].n,
            len(rows[MOST:]),
        )
        for rows, pairs in found
    ]


def _tested(made: Comparison | str) -> TypeGuard[Comparison]:
    return isinstance(made, Comparison) and made.n >= FEWEST


def said(found: Alike) -> str:
    """Return the rows from low to high perplexity, those that cannot be told apart in braces.

    Braces that overlap stand beside each other; `<` stands where every pair across is told apart.
    """
    labels = [_short(row) for row in found.rows]
    places = {row.label: place for place, row in enumerate(found.rows)}
    alike = {
        (places[one.first.label], places[one.second.label])
        for one in found.differences
        if not one.told_apart
    }
    runs = _runs(len(labels), alike)
    higher = f"; {words.count(found.left_out, 'row')} higher" if found.left_out else ""
    if len(runs) == 1:
        return f"{words.listed(labels)} cannot be told apart{higher}"
    text = _braced(labels, runs[0])
    for before, run in pairwise(runs):
        text += (", " if run.start < before.stop else " < ") + _braced(labels, run)
    shown = {pair for run in runs for pair in combinations(run, 2)}
    rest = [f"{labels[i]} and {labels[j]}" for i, j in sorted(alike - shown)]
    return text + (f" (not told apart either: {'; '.join(rest)})" if rest else "") + higher


def _runs(count: int, alike: set[tuple[int, int]]) -> list[range]:
    """Return the longest runs of neighbours in which every pair is among `alike`."""
    runs: list[range] = []
    for start in range(count):
        stop = start + 1
        while stop < count and all((i, stop) in alike for i in range(start, stop)):
            stop += 1
        if not runs or stop > runs[-1].stop:
            runs.append(range(start, stop))
    return runs


def _braced(labels: Sequence[str], run: range) -> str:
    names = ", ".join(labels[place] for place in run)
    return f"{{{names}}}" if len(run) > 1 else names


def _short(row: Row) -> str:
    """Return the row's label without the bits and group size that the title has."""
    return row.method + row.label.removeprefix(axes_label(row))
