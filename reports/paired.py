"""Which methods the same text can tell apart: paired differences, window by window.

Rows of equal bits and group size read the same windows, so each window gives one difference of
mean negative log-likelihood (nats a token; its exponential is perplexity). A percentile bootstrap
over the windows gives the interval of the mean difference (Efron and Tibshirani, "An Introduction
to the Bootstrap", 1993, chapter 13), Bonferroni-corrected for the pairs that are compared in a
group. Two rows whose interval holds zero cannot be told apart and are not ranked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from reports import words
from reports.rows import Group, Row, axes_label, main_protocol

LEVEL = 0.95
RESAMPLES = 10_000
FEWEST_WINDOWS = 8
"""Below this a bootstrap over windows says nothing reliable."""


@dataclass(frozen=True)
class Difference:
    """The mean loss of `first` minus that of `second` over the same windows, in nats a token."""

    first: Row
    second: Row
    mean: float
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Rows of one bits and group size, by perplexity, and how each pair differs."""

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    windows: int

    @property
    def title(self) -> str:
        """What the rows share."""
        bits, size = self.rows[0].bits, self.rows[0].group_size
        group = "" if size is None else ", per channel" if size == -1 else f", groups of {size}"
        return f"{bits:.3g} bits{group}"


def compare(group: Group) -> list[Comparison]:
    """Return the comparisons that the perplexities of `group` allow, most bits first."""
    protocol = main_protocol(group.rows, "perplexity")
    if protocol is None:
        return []
    sets: dict[tuple[float, int], list[tuple[Row, tuple[float, ...]]]] = defaultdict(list)
    for row in group.rows:
        value = row.get("perplexity", protocol)
        if value is None or row.bits is None or row.is_baseline:
            continue
        if len(value.samples) >= FEWEST_WINDOWS and np.isfinite(value.samples).all():
            # Rows without groups are compared among themselves.
            sets[row.bits, row.group_size or 0].append((row, value.samples))
    comparable = [
        sorted(members, key=lambda member: float(np.mean(member[1])))
        for _, members in sorted(sets.items(), key=lambda item: (-item[0][0], item[0][1]))
        if len({len(samples) for _, samples in members}) == 1 and len(members) > 1
    ]
    pairs = sum(len(members) * (len(members) - 1) // 2 for members in comparable)
    return [
        Comparison(
            tuple(row for row, _ in members),
            tuple(
                _difference(first, second, 1 - (1 - LEVEL) / pairs)
                for first, second in combinations(members, 2)
            ),
            len(members[0][1]),
        )
        for members in comparable
    ]


def _difference(
    first: tuple[Row, Sequence[float]], second: tuple[Row, Sequence[float]], level: float
) -> Difference:
    losses = np.asarray(first[1]) - np.asarray(second[1])
    # One seed for all: a pair's interval does not depend on which other pairs are compared.
    drawn = np.random.default_rng(0).integers(0, len(losses), (RESAMPLES, len(losses)))
    means = losses[drawn].mean(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(first[0], second[0], float(losses.mean()), float(low), float(high))


def said(comparison: Comparison) -> str:
    """Return the rows from low to high perplexity, those that cannot be told apart in braces.

    Braces that overlap stand beside each other; `<` stands where every pair across is told apart.
    """
    labels = [_short(row) for row in comparison.rows]
    places = {row.label: place for place, row in enumerate(comparison.rows)}
    alike = {
        (places[found.first.label], places[found.second.label])
        for found in comparison.differences
        if not found.told_apart
    }
    runs = _runs(len(labels), alike)
    if len(runs) == 1:
        return f"{words.listed(labels)} cannot be told apart"
    text = _braced(labels, runs[0])
    for before, run in pairwise(runs):
        text += (", " if run.start < before.stop else " < ") + _braced(labels, run)
    shown = {pair for run in runs for pair in combinations(run, 2)}
    rest = [f"{labels[i]} and {labels[j]}" for i, j in sorted(alike - shown)]
    return text + (f" (not told apart either: {'; '.join(rest)})" if rest else "")


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
