"""What a row has of each figure that a condition limits, or why it has none.

Perplexity and scores of tasks are held against the group's baseline, on the same text and the same
questions; the point estimate decides, and its interval stands beside it (`reports.verdicts`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from harness.record import Value
from reports import protocols, words
from reports.recommend.conditions import Limit, write, write_excess
from reports.rows import Group, Row
from reports.summary import NOISY_SPREAD, TASK_METRICS, absent, task_columns
from reports.verdicts import judge

NO_BASELINE = "its baseline was not measured"
ITSELF = "the baseline itself"
AROUND = "the limit lies inside: more samples may decide otherwise"


@dataclass(frozen=True)
class Reading:
    """A figure in its limit's unit, what to know of it, and its interval where it has one."""

    value: float
    note: str = ""
    low: float = -math.inf
    high: float = math.inf
    level: int = 95


@dataclass(frozen=True)
class Check:
    """One limit held against one row.

    Attributes:
        limit: the limit.
        value: the row's figure in the limit's unit, None where there is none.
        text: the figure in words, or why there is none.
        broken: how far it is beyond the limit, in words; empty where the limit is kept.
        excess: the same as a share of the limit, by which misses are ordered.
        note: what a reader must know of the figure, empty where nothing.
    """

    limit: Limit
    value: float | None
    text: str
    broken: str = ""
    excess: float = 0.0
    note: str = ""


def task_scores(rows: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """Return task -> (metric, protocol) of its main score, as most of `rows` have it."""
    rows = list(rows)
    found: dict[str, list[tuple[str, str]]] = {}
    for metric, protocol in task_columns(rows):
        if metric in TASK_METRICS:
            found.setdefault(protocols.task_of(protocol), []).append((metric, protocol))
    counts = Counter(key for row in rows for key in row.values)
    return {
        task: min(pairs, key=lambda pair: (-counts[pair], TASK_METRICS.index(pair[0]), pair[1]))
        for task, pairs in found.items()
    }


def check(group: Group, row: Row, limit: Limit) -> Check:
    """Return what `row` has of the figure that `limit` is of, and whether it keeps it."""
    if limit.task:
        found = _loss(group, row, limit)
    elif limit.name == "perplexity_increase":
        found = _increase(group, row)
    elif limit.name == "kl" and row.is_baseline:
        found = Reading(0.0, ITSELF)
    else:
        found = _plain(group, row, limit)
    if isinstance(found, str):
        return Check(limit, None, found)
    value, note = found.value, _note(found, limit)
    if limit.kept(value):
        return Check(limit, value, write(limit, value), note=note)
    return Check(
        limit, value, write(limit, value), write_excess(limit, value), _excess(limit, value), note
    )


def speed_note(row: Row, protocol: str) -> str:
    """Return why a speed of `row` under `protocol` is not to be trusted, empty where it is."""
    spread = row.get("timing_spread", protocol)
    if spread is None or spread.value <= NOISY_SPREAD:
        return ""
    return f"noisy timing: spread {words.figure('timing_spread', spread.value)}"


def _plain(group: Group, row: Row, limit: Limit) -> Reading | str:
    figure = limit.figure
    for metric in figure.metrics:
        protocol = group.main_protocol(metric)
        value = None if protocol is None else row.get(metric, protocol)
        if value is None or protocol is None:
            continue
        if figure.family == "speed":
            return Reading(value.value, speed_note(row, protocol))
        computed = metric.startswith("computed_")
        return Reading(value.value, "computed, nothing was stored" if computed else "")
    others = {v.protocol for metric in figure.metrics for v in row.all_of(metric)}
    if others:
        return f"{words.NOT_MEASURED} as the others were, only as {', '.join(sorted(others))}"
    return absent(row, figure.family)


def _increase(group: Group, row: Row) -> Reading | str:
    protocol = group.main_protocol("perplexity")
    value = None if protocol is None else row.get("perplexity", protocol)
    if value is None or protocol is None:
        return absent(row, "perplexity")
    if row.is_baseline:
        return Reading(0.0, ITSELF)
    baseline = group.baseline_value(row, "perplexity", protocol)
    if baseline is None or not baseline.value > 0:
        return NO_BASELINE
    judged = judge(group).get(row, "perplexity", protocol)
    increase = value.value / baseline.value - 1
    if judged is None:
        return Reading(increase, "no samples to test it by")
    return Reading(increase, low=judged.comparison.low, high=judged.comparison.high)


def _loss(group: Group, row: Row, limit: Limit) -> Reading | str:
    metric, protocol = task_scores(group.rows).get(limit.task, ("", ""))
    value = row.get(metric, protocol)
    if value is None:
        return absent(row, "tasks")
    if row.is_baseline:
        return Reading(0.0, ITSELF)
    baseline = group.baseline_value(row, metric, protocol)
    if baseline is None:
        return NO_BASELINE
    lost = baseline.value - value.value
    if limit.relative:
        if not baseline.value > 0:
            return "the baseline's score is 0, of which nothing is a share"
        lost /= baseline.value
    return _tested_loss(group, row, value, lost, relative=limit.relative)


def _tested_loss(group: Group, row: Row, value: Value, lost: float, *, relative: bool) -> Reading:
    judged = judge(group).get(row, value.metric, value.protocol)
    if judged is None:
        return Reading(lost, "no paired answers to test it by")
    if judged.at_chance:
        return Reading(lost, "the baseline is no better than chance, so a loss says nothing")
    found = judged.comparison
    if not relative:
        return Reading(lost, low=-found.high, high=-found.low)
    if found.loss_low is None or found.loss_high is None:
        return Reading(lost)
    return Reading(lost, low=found.loss_low, high=found.loss_high, level=90)


def _note(found: Reading, limit: Limit) -> str:
    """Return what to know of a figure, its interval included."""
    said = [found.note] if found.note else []
    if math.isfinite(found.low) and math.isfinite(found.high):
        low, high = write(limit, found.low), write(limit, found.high)
        said.append(f"{found.level} % interval {low} to {high}")
        if found.low < limit.value < found.high:
            said.append(AROUND)
    return ", ".join(said)


def _excess(limit: Limit, value: float) -> float:
    """Return how far `value` is beyond the limit as a share of it.

    Of a share what it multiplies counts: 33 % more perplexity is 1.33 times the baseline's.
    """
    given, wanted = value, limit.value
    if limit.figure.kind in ("share", "loss"):
        given, wanted = 1 + given, 1 + wanted
    if not math.isfinite(given) or wanted == 0 or given == 0:
        return math.inf
    return abs(given / wanted - 1)
