"""Which rows of a group keep a set of conditions, which no other beats, and which one to take.

A row qualifies where it has every figure that a limit asks for and keeps all limits. The Pareto
front of those is taken over quality, memory (or size) and decoding speed; what a row was not
measured in counts as the worst there is. Of the front, rows whose quality the same samples cannot
tell apart (`reports.stats`, p corrected by Holm's method) are as good as each other: then memory
decides, then speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reports import words
from reports.bootstrap import FEWEST
from reports.paired import LEVEL
from reports.recommend.conditions import Conditions
from reports.recommend.readings import Check, check, speed_note
from reports.rows import Group, Row
from reports.stats import Comparison, holm
from reports.verdicts import pair

RANKING = ("accuracy", "size", "speed")
"""Priorities that the front's rows can be ranked by."""

UNQUANTIZED_BITS = 16
"""Bits a weight from which a row is not called quantized."""

EQUAL_COST = 0.01
"""Relative difference up to which two memories or sizes count as the same."""


@dataclass(frozen=True)
class Axis:
    """One axis of the front: a metric under one protocol, and whether less of it is better."""

    metric: str
    protocol: str
    lower: bool

    def value(self, row: Row) -> float | None:
        """Return the row's figure, None where it has none."""
        found = row.get(self.metric, self.protocol)
        return None if found is None else found.value

    def key(self, row: Row) -> float:
        """Return the figure such that less is better; infinite where there is none."""
        value = self.value(row)
        if value is None or math.isnan(value):
            return math.inf
        return value if self.lower else -value

    def text(self, row: Row) -> str:
        """Return the figure in words."""
        value = self.value(row)
        return words.NOT_MEASURED if value is None else words.figure(self.metric, value)

    @property
    def title(self) -> str:
        """Its name in words."""
        return words.title(self.metric)


@dataclass(frozen=True)
class Axes:
    """The axes of a group; None where nothing was measured."""

    quality: Axis | None
    cost: Axis | None
    speed: Axis | None

    @property
    def known(self) -> tuple[Axis, ...]:
        """Those that there are."""
        return tuple(axis for axis in (self.quality, self.cost, self.speed) if axis is not None)


@dataclass(frozen=True)
class Candidate:
    """A row and how it stands to every limit."""

    row: Row
    checks: tuple[Check, ...]

    @property
    def unmeasured(self) -> tuple[Check, ...]:
        """The limits whose figure it does not have."""
        return tuple(check for check in self.checks if check.value is None)

    @property
    def broken(self) -> tuple[Check, ...]:
        """The limits that it breaks."""
        return tuple(check for check in self.checks if check.broken)

    @property
    def qualifies(self) -> bool:
        """Whether it has every figure and keeps every limit."""
        return not self.unmeasured and not self.broken


@dataclass(frozen=True)
class Choice:
    """The row to take, why, and the rows at the front's other ends as (what, row)."""

    row: Row
    why: tuple[str, ...]
    others: tuple[tuple[str, Row], ...]


@dataclass(frozen=True)
class Selection:
    """How the rows of one group stand to the conditions.

    Attributes:
        group, conditions: what was asked of what.
        axes: of the front.
        qualifying: rows that keep every limit, the front first.
        front: cells of those no other beats.
        misses: measured rows that break a limit, the nearest first.
        unmeasured: rows that lack a figure.
        failed: rows whose cells failed.
        left_out: rows that exact conditions leave out.
        choice: the row to take, None where nothing qualifies, or nothing says which.
    """

    group: Group
    conditions: Conditions
    axes: Axes
    qualifying: tuple[Candidate, ...]
    front: frozenset[str]
    misses: tuple[Candidate, ...]
    unmeasured: tuple[Candidate, ...]
    failed: tuple[Row, ...]
    left_out: tuple[Row, ...]
    choice: Choice | None


def select(group: Group, conditions: Conditions) -> Selection:
    """Return which rows of `group` keep `conditions`, and which of them to take."""
    asked = [row for row in group.rows if _is_asked(row, conditions)]
    measured = [
        Candidate(row, tuple(check(group, row, limit) for limit in conditions.limits))
        for row in asked
        if row.measured
    ]
    qualifying = [one for one in measured if one.qualifies]
    axes = _axes(group, conditions, [one.row for one in qualifying])
    best = front([one.row for one in qualifying], axes)
    misses = [one for one in measured if one.broken and not one.unmeasured]
    return Selection(
        group,
        conditions,
        axes,
        tuple(sorted(qualifying, key=lambda one: one.row.record.cell not in best)),
        best,
        tuple(sorted(misses, key=_distance)),
        tuple(one for one in measured if one.unmeasured),
        tuple(row for row in asked if not row.measured),
        tuple(row for row in group.rows if not _is_asked(row, conditions)),
        choose([one.row for one in qualifying if one.row.record.cell in best], axes, conditions),
    )


def front(rows: Sequence[Row], axes: Axes) -> frozenset[str]:
    """Return the cells of the rows that no other is as good as in every axis and better in one."""
    keys = {row.record.cell: tuple(axis.key(row) for axis in axes.known) for row in rows}
    return frozenset(
        cell
        for cell, own in keys.items()
        if not any(
            other != own and all(x <= y for x, y in zip(other, own, strict=True))
            for other in keys.values()
        )
    )


def choose(rows: Sequence[Row], axes: Axes, conditions: Conditions) -> Choice | None:
    """Return which of the front's `rows` to take by what counts most.

    None where there are none, and where quality should decide and was measured of none: fewer bits
    would win each time. The unquantized baseline is taken only where no other row is there.
    """
    if not rows:
        return None
    others = [row for row in rows if not row.is_baseline]
    if not others:
        alone = (
            "The unquantized model is alone on the front: no other row that qualifies is better in "
            "quality, memory or speed."
        )
        return Choice(rows[0], (alone,), ())
    priority = (conditions.exact.get("priority") or ("accuracy",))[0]
    if priority == "size" and axes.cost is not None:
        found, why = _least(others, axes.cost, axes)
    elif priority == "speed" and axes.speed is not None:
        found, why = _least(others, axes.speed, axes)
    elif axes.quality is not None and any(math.isfinite(axes.quality.key(r)) for r in others):
        found, why = _most_accurate(others, axes.quality, axes)
    else:
        return None
    if priority not in RANKING:
        why.append(f"Nothing measured ranks rows by {priority}: it asks the documents alone.")
    why += [f"The unquantized {row.label} qualifies too." for row in rows if row.is_baseline]
    if axes.speed is not None and (note := speed_note(found, axes.speed.protocol)):
        why.append(f"Its speed is not to be trusted, {note}: measure it again.")
    return Choice(found, tuple(why), _ends(others, found, axes))


def _is_asked(row: Row, conditions: Conditions) -> bool:
    own = {
        "model": row.model,
        "hardware": row.hardware,
        "method": row.plain_method,
        "execution": row.execution,
    }
    return all(own[name] in wanted for name, wanted in conditions.exact.items() if name in own)


def _axes(group: Group, conditions: Conditions, rows: Sequence[Row]) -> Axes:
    """Return the axes of which at least one of `rows` has a figure."""

    def first(*metrics: str, lower: bool) -> Axis | None:
        for metric in metrics:
            protocol = group.main_protocol(metric)
            if protocol is not None and any(row.get(metric, protocol) for row in rows):
                return Axis(metric, protocol, lower)
        return None

    costs = ["peak_memory_bytes", "artefact_bytes", "computed_bytes"]
    limited = {limit.name for limit in conditions.limits}
    sizes = "size" in limited or "size" in conditions.exact.get("priority", ())
    if sizes and "memory" not in limited:
        costs = [*costs[1:], costs[0]]
    return Axes(
        first("perplexity", lower=True) or first("embedding_cosine", lower=False),
        first(*costs, lower=True),
        first("decode_tokens_per_second", lower=False),
    )


def _distance(one: Candidate) -> tuple[int, float]:
    """Return how far a row is from qualifying: by limits broken, then by how much."""
    return len(one.broken), sum(check.excess for check in one.broken)


def _least(rows: Sequence[Row], axis: Axis, axes: Axes) -> tuple[Row, list[str]]:
    """Return the row that is best in `axis`; equal ones by quality."""
    quality = axes.quality.key if axes.quality is not None else _nothing
    found = min(rows, key=lambda row: (axis.key(row), quality(row)))
    said = "least" if axis.lower else "most"
    why = [
        f"Rule: of the front, the {said} {axis.title.lower()}, whatever the loss within the "
        f"limits. {found.label} has {axis.text(found)}."
    ]
    if axis is axes.speed:
        why.append("Speeds of two rows are not tested against noise.")
    return found, why


def _nothing(row: Row) -> float:
    return 0.0


def _most_accurate(rows: Sequence[Row], quality: Axis, axes: Axes) -> tuple[Row, list[str]]:
    best = min(rows, key=quality.key)
    others = [row for row in rows if row is not best and math.isfinite(quality.key(row))]
    made = {row.label: pair(row, best, quality.metric, quality.protocol) for row in others}
    tested = {
        label: found
        for label, found in made.items()
        if isinstance(found, Comparison) and (found.n >= FEWEST or found.test == "identical")
    }
    adjusted = dict(zip(tested, holm([found.p for found in tested.values()]), strict=True))
    alike = [row for row in others if adjusted.get(row.label, 0.0) >= LEVEL]
    why = [_rule(quality, axes, list(tested.values())), _best_of(best, quality, alike, tested)]
    untested = [
        f"{label} ({found if isinstance(found, str) else words.count(found.n, 'sample')})"
        for label, found in made.items()
        if label not in tested
    ]
    if untested:
        why.append(f"Not to be compared with it: {words.listed(untested)}.")
    chosen, said = _cheapest([best, *alike], axes)
    if chosen is not best:
        said.append(_how_far(tested[chosen.label], quality, best))
    return chosen, [*why, *said]


def _how_far(found: Comparison, quality: Axis, best: Row) -> str:
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return f"Its samples are those of {best.label}."
    write = words.percent if quality.metric == "perplexity" else words.signed
    return (
        f"Its {quality.title.lower()} is {write(found.low)} to {write(found.high)} from "
        f"{best.label}'s (95 % interval)."
    )


def _rule(quality: Axis, axes: Axes, tested: Sequence[Comparison]) -> str:
    better = "lowest" if quality.lower else "highest"
    text = f"Rule: of the front, the {better} {quality.title.lower()}"
    if tested:
        n = tested[0].n
        text += (
            f"; rows that the same {words.count(n, 'sample')} cannot tell from it (paired test, "
            f"{words.count(len(tested), 'comparison')}, Holm, {100 * LEVEL:g} %) count as equal"
        )
        if axes.cost is not None:
            text += f", and of those the least {axes.cost.title.lower()} decides"
            text += ", then the speed" if axes.speed is not None else ""
    return f"{text}."


def _best_of(
    best: Row, quality: Axis, alike: Sequence[Row], tested: Mapping[str, Comparison]
) -> str:
    level = "lowest" if quality.lower else "highest"
    text = f"{best.label} has the {level} {quality.title.lower()}, {quality.text(best)}"
    if not tested:
        return f"{text}; there is no other to compare it with."
    if not alike:
        return f"{text}, and every other row of the front is told apart from it."
    names = words.listed([row.label for row in alike])
    return f"{text}; {names} cannot be told from it."


def _cheapest(rows: Sequence[Row], axes: Axes) -> tuple[Row, list[str]]:
    """Return the row of least cost, of equal costs the fastest, and what decided."""
    if len(rows) == 1 or axes.cost is None:
        return rows[0], []
    least = min(map(axes.cost.key, rows))
    near = [row for row in rows if axes.cost.key(row) <= least * (1 + EQUAL_COST)]
    if not math.isfinite(least) or (len(near) > 1 and axes.speed is None):
        return rows[0], []
    cost = axes.cost.title.lower()
    if len(near) == 1 or axes.speed is None:
        return near[0], [
            f"Of these, {near[0].label} has the least {cost}: {axes.cost.text(near[0])}."
        ]
    found = min(near, key=axes.speed.key)
    names = words.listed([row.label for row in near])
    return found, [
        f"Of these, {names} have the least {cost}, within {100 * EQUAL_COST:g} %; "
        f"{found.label} decodes fastest: {axes.speed.text(found)}."
    ]


def _ends(rows: Sequence[Row], chosen: Row, axes: Axes) -> tuple[tuple[str, Row], ...]:
    """Return the rows at the front's ends that were not chosen."""
    memory = axes.cost is not None and axes.cost.metric == "peak_memory_bytes"
    quantized = [row for row in rows if (row.bits or 0) < UNQUANTIZED_BITS]
    ends = (
        ("least loss", axes.quality, rows),
        ("least loss below 16 bits", axes.quality, [] if chosen in quantized else quantized),
        ("least memory" if memory else "smallest", axes.cost, rows),
        ("fastest", axes.speed, rows),
    )
    found: dict[str, tuple[str, Row]] = {}
    for what, axis, of in ends:
        if axis is None or not of:
            continue
        row = min(of, key=axis.key)
        before = found.get(row.record.cell, ("", row))[0]
        if (
            row is not chosen
            and math.isfinite(axis.key(row))
            and not what.startswith(before or "-")
        ):
            found[row.record.cell] = (f"{before}, {what}" if before else what, row)
    return tuple(found.values())
