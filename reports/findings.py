"""What the measured rows of a group say, by rules that stand beside each sentence.

Every sentence is computed from the rows; where no row answers a question, the sentence says so.
A figure decides by its value alone, but for methods of equal bits and group size: those are ranked
only where `reports.paired` tells them apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from harness.record import Value
from reports import words
from reports.paired import LEVEL, compare, said
from reports.rows import Group, Row, kept_back, main_protocol, mapping, number, sequence
from reports.summary import NOISY_SPREAD, noisy

MARGINS = (0.01, 0.03)
"""Increases of perplexity over the baseline that are asked about."""

DRIFT = 0.1
"""Change of the time per token from the first burst to the last from which it is mentioned."""

BROKEN = 2.0
"""Ratio of perplexity to the baseline's above which a row is listed as damaged."""


@dataclass(frozen=True)
class Finding:
    """What was asked of a group, the answer, and the rule it follows from."""

    question: str
    answer: str
    rule: str


@dataclass(frozen=True)
class Point:
    """A row in a figure of perplexity (y) against something (x)."""

    row: Row
    x: float
    y: float
    best: bool


@dataclass(frozen=True)
class Plane:
    """Perplexity against one metric, each under one protocol, for the rows that have both.

    `best` points are those no other row beats in both; `left_out` names the rows that have both
    figures but one that cannot be drawn.
    """

    metric: str
    protocol: str
    perplexity_protocol: str
    higher_is_better: bool
    points: tuple[Point, ...]
    left_out: tuple[str, ...]


def plane(group: Group, metric: str) -> Plane | None:
    """Return perplexity against `metric` for the rows of `group`, None where fewer than two."""
    protocol = main_protocol(group.rows, metric)
    quality = main_protocol(group.rows, "perplexity")
    if protocol is None or quality is None:
        return None
    pairs: list[tuple[Row, Value, Value]] = []
    for row in group.rows:
        x, y = row.get(metric, protocol), row.get("perplexity", quality)
        if row.measured and x is not None and y is not None:
            pairs.append((row, x, y))
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
        f"{row.label} (perplexity {words.figure('perplexity', y.value)})"
        for row, x, y in pairs
        if not (_drawable(x.value) and _drawable(y.value))
    )
    return Plane(metric, protocol, quality, higher, points, left_out)


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each point whether none other is as small in both and smaller in one."""
    front = [False] * len(points)
    lowest, lowest_x = math.inf, math.inf
    for x, y, index in sorted((x, y, index) for index, (x, y) in enumerate(points)):
        if y < lowest or (y == lowest and x == lowest_x):
            front[index] = True
            lowest, lowest_x = y, x
    return front


def findings(group: Group) -> list[Finding]:
    """Return what the rows of `group` say."""
    return [
        *_smallest_within(group),
        *_fastest(group),
        *_slower_than_baseline(group),
        *_fronts(group),
        *_told_apart(group),
        *_broken(group),
    ]


def warnings(group: Group) -> list[str]:
    """Return what should make a reader of the group's figures careful."""
    found = []
    flagged = [row.label for row in group.rows if noisy(row)]
    if flagged:
        found.append(
            f"Timing of {words.listed(flagged)} was noisy: the interquartile range of the time per "
            f"token is above {100 * NOISY_SPREAD:g} % of its median. Measure again on a quiet "
            "machine before using these speeds."
        )
    found += _about_timing(group)
    found += _out_of_order(group)
    below = [row.label for row in group.rows if _below_noise_floor(row)]
    if below:
        found.append(
            f"The divergence of {words.listed(below)} is not above the noise floor: as far as this "
            "text can tell, nothing changed."
        )
    nonfinite = [row.label for row in group.rows if _any_above(row, "nonfinite_logits", 0)]
    if nonfinite:
        found.append(f"Logits that are not finite were counted in {words.listed(nonfinite)}.")
    if not group.baselines:
        found.append("The baseline of this group was not measured: nothing is compared with it.")
    return found


def _smallest_within(group: Group) -> list[Finding]:
    protocol = main_protocol(group.rows, "perplexity")
    sizes = main_protocol(group.rows, "artefact_bytes")
    if protocol is None or sizes is None:
        return []
    found = []
    for margin in MARGINS:
        fitting: list[tuple[float, float, Row]] = []
        for row in group.rows:
            increase = _increase(group, row, protocol)
            size = row.get("artefact_bytes", sizes)
            if size is not None and increase is not None and increase <= 1 + margin:
                fitting.append((size.value, increase, row))
        rule = (
            f"Among rows whose perplexity ({protocol}) is at most {100 * margin:g} % above the "
            "baseline's, the one with the fewest bytes on disk; of equal ones, the lower "
            "perplexity."
        )
        if fitting:
            size_bytes, increase, row = min(fitting, key=lambda found: found[:2])
            ratio = _over_baseline(group, row, "artefact_bytes", sizes)
            answer = (
                f"{row.label}, {words.figure('artefact_bytes', size_bytes)}{ratio}, "
                f"perplexity {words.increase(increase)}"
            )
        elif group.baselines:
            answer = "no row but the baseline"
        else:
            continue
        question = f"Smallest within {100 * margin:g} % of the baseline's perplexity"
        found.append(Finding(question, answer, rule))
    return found


def _fastest(group: Group) -> list[Finding]:
    metric = "decode_tokens_per_second"
    protocol = main_protocol(group.rows, metric)
    if protocol is None:
        return []
    pairs = [(value, row) for row in group.rows if (value := row.get(metric, protocol))]
    measured = [(value.value, row) for value, row in pairs if math.isfinite(value.value)]
    if len(measured) < 2:
        return []
    speed, row = max(measured, key=lambda pair: pair[0])
    text = f"{row.label}, {words.figure(metric, speed)}"
    speedup = row.get("decode_speedup", protocol)
    if row.is_baseline:
        text += ", the baseline itself"
    elif speedup is not None:
        text += f", {words.ratio(speedup.value)} the baseline timed in turns with it"
    text += "; its timing was noisy" if noisy(row) else ""
    return [
        Finding(
            "Fastest decode", text, f"The highest decode_tokens_per_second measured ({protocol})."
        )
    ]


def _slower_than_baseline(group: Group) -> list[Finding]:
    protocol = main_protocol(group.rows, "decode_speedup")
    if protocol is None:
        return []
    pairs = [(value, row) for row in group.rows if (value := row.get("decode_speedup", protocol))]
    slower = [row for value, row in pairs if value.value < 1]
    text = f"{len(slower)} of {words.count(len(pairs), 'row')}"
    if slower:
        text += f" ({words.listed([row.label for row in slower])})"
    converted = sum(row.execution == "dequantized" for row in slower)
    if converted:
        text += f"; of these, weights are converted at each call (dequantized) in {converted}"
    rule = f"decode_speedup below 1: the baseline timed in turns in the same process ({protocol})."
    return [Finding("Decode slower than the baseline", text, rule)]


def _fronts(group: Group) -> list[Finding]:
    found = []
    for metric, name in (
        ("artefact_bytes", "bytes on disk"),
        ("decode_tokens_per_second", "decode speed"),
    ):
        drawn = plane(group, metric)
        if drawn is not None:
            best = [point.row.label for point in drawn.points if point.best]
            found.append(
                Finding(
                    f"Not beaten in both perplexity and {name}",
                    words.listed(best),
                    f"The Pareto front: no other row is at least as good in perplexity "
                    f"({drawn.perplexity_protocol}) and {metric} ({drawn.protocol}) and better in "
                    "one of them.",
                )
            )
    return found


def _told_apart(group: Group) -> list[Finding]:
    protocol = main_protocol(group.rows, "perplexity")
    return [
        Finding(
            f"Methods by perplexity at {found.title}",
            said(found),
            f"Mean loss ({protocol}) of the same {found.windows} windows, paired. Methods in "
            "braces cannot be told apart and are not ranked: the bootstrap interval of their "
            f"difference holds 0 ({100 * LEVEL:g} % over all pairs of this table, Bonferroni).",
        )
        for found in compare(group)
    ]


def _broken(group: Group) -> list[Finding]:
    protocol = main_protocol(group.rows, "perplexity")
    if protocol is None or not group.baselines:
        return []
    damaged = []
    for row in group.rows:
        increase = _increase(group, row, protocol)
        if increase is not None and not increase <= BROKEN:
            damaged.append(row.label)
    if not damaged:
        return []
    return [
        Finding(
            "Perplexity more than doubles in",
            words.listed(damaged),
            f"Perplexity ({protocol}) above {BROKEN:g} times the baseline's, or not a number.",
        )
    ]


def _about_timing(group: Group) -> list[str]:
    drifted, cached = [], []
    for row in group.rows:
        speed = {} if kept_back(row, "speed") else mapping(row.record.details.get("speed"))
        points = [mapping(point) for point in sequence(speed.get("points"))]
        ratios = [number(point.get("last_burst_over_first")) for point in points]
        if any(ratio is not None and abs(ratio - 1) > DRIFT for ratio in ratios):
            drifted.append(row.label)
        if any(point.get("weights_fit_into_caches") is True for point in points):
            cached.append(row.label)
    found = []
    if drifted:
        found.append(
            f"The time per token of {words.listed(drifted)} changed by more than {100 * DRIFT:g} % "
            "from the first burst to the last: the machine was not in a steady state."
        )
    if cached:
        rows = "every row" if len(cached) == len(group.measured) else words.listed(cached)
        found.append(
            f"The weights of {rows} fit into the processor's caches: these speeds do not carry "
            "over to models that have to be read from memory."
        )
    return found


def _out_of_order(group: Group) -> list[str]:
    """Return a sentence for each method whose perplexity falls where its bits do."""
    protocol = main_protocol(group.rows, "perplexity")
    series: dict[tuple[str, int | None], list[tuple[float, float, Row]]] = defaultdict(list)
    for row in group.rows if protocol is not None else ():
        value = row.get("perplexity", protocol or "")
        if value is not None and row.bits is not None and not row.is_baseline:
            series[row.method, row.group_size].append((row.bits, value.value, row))
    found = []
    for members in series.values():
        ordered = sorted(members, key=lambda member: -member[0])
        for (bits, high, wide), (fewer, low, narrow) in pairwise(ordered):
            if bits > fewer and low < high:
                found.append(
                    f"{narrow.label} has a lower perplexity than {wide.label}: fewer bits should "
                    "not help. Find out why before relying on either."
                )
    return found


def _increase(group: Group, row: Row, protocol: str) -> float | None:
    """Return perplexity over the baseline's; None for the baseline and where either is absent."""
    value = row.get("perplexity", protocol)
    if value is None or row.is_baseline:
        return None
    other = group.baseline_value(row, "perplexity", protocol)
    return None if other is None or other.value <= 0 else value.value / other.value


def _over_baseline(group: Group, row: Row, metric: str, protocol: str) -> str:
    value, other = row.get(metric, protocol), group.baseline_value(row, metric, protocol)
    if value is None or other is None or other.value <= 0:
        return ""
    return f" ({words.ratio(value.value / other.value)})"


def _below_noise_floor(row: Row) -> bool:
    for value in row.all_of("kl_mean"):
        floor = row.get("kl_noise_floor", value.protocol)
        if floor is not None and not row.is_baseline and value.value <= floor.value:
            return True
    return False


def _any_above(row: Row, metric: str, limit: float) -> bool:
    return any(value.value > limit for value in row.all_of(metric))


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0
