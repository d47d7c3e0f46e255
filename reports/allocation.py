"""Which matrix got which bits, and whether that beats choosing the same for all of them.

From `details["method"]["allocation"]` of rows. The check at equal bytes: logarithm of the mean KL,
linear in bytes between neighbouring uniform rows on their lower hull. Uniform rows are those of
rtn and of every method that the allocation chose from, in the same group and under the same
protocols. Where all three rows scored the same windows, the standard error of the logarithm of
the ratio is that of the windows' linearized differences (delta method).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.record import Value
from reports import words
from reports.blocks import Block, Field, Grid, Head, Map, Picture, Spot, number, plain
from reports.rows import Group, Row, mapping, node_label, sequence
from reports.rows import number as figure

MOST_PICTURES = 6
UNQUANTIZED = "unquantized"
"""Candidate that leaves a matrix in the floating type it had."""

CERTAIN = 1.96
"""Standard errors of a two-sided test at 5 %."""

FEWEST_WINDOWS = 8


@dataclass(frozen=True)
class Uniform:
    """A row of one choice for all matrices: its bytes and its mean KL."""

    row: Row
    size: float
    kl: Value


@dataclass(frozen=True)
class Validation:
    """A mix against the curve of the uniform rows at its bytes.

    `ratio` is its KL over the curve's; `interval` its 95 % interval where samples give one.
    `verdict` is `better`, `worse`, `not distinguishable` or `cannot be told`; `why` says of the
    last one why, of the others between which rows.
    """

    verdict: str
    why: str
    ratio: float | None = None
    expected: float | None = None
    interval: tuple[float, float] | None = None


def allocation_of(row: Row) -> Mapping[str, Any]:
    """Return what `row` says of its allocation, empty where it has none."""
    return mapping(mapping(row.record.details.get("method")).get("allocation"))


def candidate_label(row: Row, name: str) -> str:
    """Return what candidate `name` of the row is: method, bits, group size; else its name."""
    method = mapping(mapping(row.record.config.get("resolved")).get("method"))
    node = mapping(mapping(method.get("candidates")).get(name))
    return node_label(node) if node.get("name") else name


def allocation_blocks(group: Group) -> list[Block]:
    """Return the block of the group's rows that have an allocation, none where none has."""
    rows = [row for row in group.measured if allocation_of(row)]
    if not rows:
        return []
    pictures: list[Picture] = [
        drawn for row in rows[:MOST_PICTURES] if (drawn := allocation_map(row))
    ]
    sentences = [_sentence(group, row) for row in rows]
    if len(rows) > MOST_PICTURES:
        sentences.append(f"Drawn are the first {MOST_PICTURES} of {len(rows)} allocations.")
    return [
        Block(
            "Mixed bits",
            tuple(sentences),
            tuple(pictures),
            (_budgets(group, rows), _candidates(rows), _every(rows)),
            "Predicted: the sum of the KL of the matrices quantized alone. At equal bytes: the "
            "row's KL over that of the curve through the uniform rows' lower hull (logarithm of "
            "the KL, linear in bytes) at the bytes of the row.",
        )
    ]


def validate(group: Group, row: Row) -> Validation:
    """Return whether `row` lies below the curve of the uniform rows of its group."""
    sizes, quality = (group.main_protocol(name) for name in ("artefact_bytes", "kl_mean"))
    size = row.get("artefact_bytes", sizes) if sizes else None
    kl = row.get("kl_mean", quality) if quality else None
    if sizes is None or quality is None or size is None or kl is None:
        return Validation("cannot be told", "its bytes or its KL were not measured")
    if not (math.isfinite(kl.value) and kl.value > 0):
        return Validation("cannot be told", f"its KL is {words.figure('kl_mean', kl.value)}")
    hull = lower_hull(_uniform(group, row, sizes, quality))
    if len(hull) < 2:
        return Validation("cannot be told", "fewer than two uniform rows stand beside it")
    below = [found for found in hull if found.size <= size.value]
    above = [found for found in hull if found.size > size.value]
    if not above and hull[-1].size == size.value:
        below, above = list(hull[:-1]), [hull[-1]]
    if not below or not above:
        side = "fewer" if not below else "more"
        edge = hull[0] if not below else hull[-1]
        return Validation(
            "cannot be told",
            f"it takes {side} bytes than every uniform row on the curve (the last is "
            f"{edge.row.label}, {words.figure('artefact_bytes', edge.size)})",
        )
    return _compared(kl, size.value, below[-1], above[0])


def _compared(kl: Value, size: float, left: Uniform, right: Uniform) -> Validation:
    part = (size - left.size) / (right.size - left.size)
    expected = math.exp((1 - part) * math.log(left.kl.value) + part * math.log(right.kl.value))
    ratio = kl.value / expected
    error = _error(kl, left.kl, right.kl, part)
    between = f"between {left.row.label} and {right.row.label}"
    if error is None:
        verdict = "better" if ratio < 1 else "worse"
        return Validation(verdict, f"{between}; not tested", ratio, expected)
    interval = (ratio * math.exp(-CERTAIN * error), ratio * math.exp(CERTAIN * error))
    verdict = "better" if interval[1] < 1 else "worse" if interval[0] > 1 else "not distinguishable"
    return Validation(verdict, between, ratio, expected, interval)


def _error(kl: Value, left: Value, right: Value, part: float) -> float | None:
    """Return the standard error of log(KL / curve), None where the windows do not pair."""
    counts = {len(value.samples) for value in (kl, left, right)}
    if len(counts) != 1 or counts.pop() < FEWEST_WINDOWS:
        return None
    differences = [
        a / kl.value - (1 - part) * b / left.value - part * c / right.value
        for a, b, c in zip(kl.samples, left.samples, right.samples, strict=True)
    ]
    if not all(map(math.isfinite, differences)):
        return None
    return statistics.stdev(differences) / math.sqrt(len(differences))


def lower_hull(rows: Sequence[Uniform]) -> tuple[Uniform, ...]:
    """Return the rows on the lower convex hull of log KL over bytes, as far as it falls."""
    hull: list[Uniform] = []
    for found in sorted(rows, key=lambda one: (one.size, one.kl.value)):
        if hull and found.size == hull[-1].size:
            continue
        while len(hull) > 1 and _bends_up(hull[-2], hull[-1], found):
            hull.pop()
        hull.append(found)
    lowest = min(range(len(hull)), key=lambda place: hull[place].kl.value, default=-1)
    return tuple(hull[: lowest + 1])


def _bends_up(first: Uniform, middle: Uniform, last: Uniform) -> bool:
    """Whether `middle` lies on or above the line from `first` to `last`."""
    slope = (math.log(last.kl.value) - math.log(first.kl.value)) / (last.size - first.size)
    line = math.log(first.kl.value) + slope * (middle.size - first.size)
    return math.log(middle.kl.value) >= line


def _uniform(group: Group, row: Row, sizes: str, quality: str) -> list[Uniform]:
    names = {
        candidate_label(row, str(name)).partition(" ")[0]
        for name in sequence(allocation_of(row).get("candidates"))
    }
    found = []
    for other in group.measured:
        size, kl = other.get("artefact_bytes", sizes), other.get("kl_mean", quality)
        if (
            other.plain_method in {*names, "rtn"}
            and not allocation_of(other)
            and other.activation_bits is None
            and other.bits is not None
            and size is not None
            and kl is not None
            and math.isfinite(kl.value)
            and kl.value > 0
        ):
            found.append(Uniform(other, size.value, kl))
    return found


def _sentence(group: Group, row: Row) -> str:
    found = validate(group, row)
    if found.ratio is None or found.expected is None:
        return (
            f"{row.label}: whether it is better than uniform bits at equal bytes cannot be told, "
            f"since {found.why}."
        )
    said = {
        "better": "the mix is better",
        "worse": "the mix is worse",
        "not distinguishable": "the windows cannot tell the two apart",
    }[found.verdict]
    interval = ""
    if found.interval is not None:
        interval = f", 95 % interval {found.interval[0]:.2f} to {found.interval[1]:.2f}"
    return (
        f"{row.label} at equal bytes: {said}. Its KL is ×{found.ratio:.2f} of the uniform curve's "
        f"{words.significant(found.expected)} {found.why}{interval}."
    )


def _budgets(group: Group, rows: Sequence[Row]) -> Grid:
    heads = (
        *(Head("Row"), Head("Budget"), Head("Wanted", numeric=True), Head("Reached", numeric=True)),
        *(Head("KL, predicted", "nats", True), Head("KL, measured", "nats", True)),
        *(Head("At equal bytes", "× of the curve", True), Head("Verdict")),
    )
    quality = group.main_protocol("kl_mean")
    lines = []
    for row in rows:
        facts = allocation_of(row)
        budget = mapping(facts.get("budget"))
        unit = str(budget.get("unit") or "")
        kl = row.get("kl_mean", quality) if quality else None
        found = validate(group, row)
        lines.append(
            (
                Field(row.label),
                Field(str(budget.get("kind") or "–").replace("_", " ")),
                _amount(figure(budget.get("wanted")), unit, "none"),
                _amount(figure(budget.get("reached")), unit, words.UNKNOWN),
                plain(figure(facts.get("predicted_kl")), "not predicted"),
                plain(None if kl is None else kl.value, words.NOT_MEASURED),
                Field(words.UNKNOWN)
                if found.ratio is None
                else Field(f"{found.ratio:.2f}", found.ratio),
                Field(found.verdict),
            )
        )
    return Grid("Budget, prediction and what was measured", heads, tuple(lines))


def _amount(value: float | None, unit: str, absent: str) -> Field:
    if value is None:
        return Field(absent)
    metrics = {"B": "x_bytes", "bytes": "x_bytes", "s": "x_seconds", "seconds": "x_seconds"}
    if unit in metrics:
        return number(metrics[unit], value)
    return Field(f"{words.significant(value)} {unit}".rstrip(), value)


def _candidates(rows: Sequence[Row]) -> Grid:
    names = sorted({name for row in rows for name in _counts(row)}, key=words.natural)
    lines = []
    for row in rows:
        counts = _counts(row)
        total = sum(weights for _, weights in counts.values())
        fields = [
            Field("0", 0.0)
            if name not in counts
            else Field(
                f"{counts[name][0]} ({100 * counts[name][1] / max(1, total):.0f} % of weights)",
                float(counts[name][0]),
            )
            for name in names
        ]
        lines.append((Field(row.label), *fields))
    heads = (Head("Row"), *(Head(name, "matrices", True) for name in names))
    return Grid("Matrices by choice", heads, tuple(lines))


def _counts(row: Row) -> dict[str, tuple[int, int]]:
    """Return candidate -> (matrices, weights) of the row."""
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for entry in map(mapping, sequence(allocation_of(row).get("modules"))):
        name = candidate_label(row, str(entry.get("candidate", "")))
        count, weights = found[name]
        found[name] = (count + 1, weights + int(figure(entry.get("weights")) or 0))
    return dict(found)


def _every(rows: Sequence[Row]) -> Grid:
    heads = (
        *(Head("Matrix"), Head("Row"), Head("Choice"), Head("Bits", numeric=True)),
        *(Head("Weights", numeric=True), Head("KL alone", "nats", True)),
    )
    lines = [
        (
            Field(str(entry.get("name", ""))),
            Field(row.label),
            Field(candidate_label(row, str(entry.get("candidate", "")))),
            plain(figure(entry.get("bits"))),
            plain(figure(entry.get("weights"))),
            plain(figure(entry.get("kl"))),
        )
        for row in rows
        for entry in map(mapping, sequence(allocation_of(row).get("modules")))
    ]
    return Grid(f"Matrix by matrix ({len(lines)})", heads, tuple(lines), folded=True)


def allocation_map(row: Row) -> Map | None:
    """Return the picture of the bits of each matrix of `row`, None where it has no allocation."""
    modules = [mapping(entry) for entry in sequence(allocation_of(row).get("modules"))]
    bits = [found for entry in modules if (found := figure(entry.get("bits"))) is not None]
    if not bits:
        return None
    numbers = {figure(entry.get("block")) for entry in modules}
    blocks = sorted(block for block in numbers if block is not None)
    rows = [*(f"block {block:.0f}" for block in blocks), *(["no block"] if None in numbers else [])]
    kinds = [str(entry.get("module") or entry.get("name", "")) for entry in modules]
    columns = list(dict.fromkeys(kinds))
    chosen = [candidate_label(row, str(entry.get("candidate", ""))) for entry in modules]
    names = {name.partition(" ")[0] for name in chosen} - {UNQUANTIZED}
    low, high = math.log2(max(1.0, min(bits))), math.log2(max(2.0, *bits))
    spots = {}
    for entry, kind, candidate in zip(modules, kinds, chosen, strict=True):
        value, block = figure(entry.get("bits")), figure(entry.get("block"))
        text = words.bits(value)
        if len(names) > 1:
            text = f"{candidate.partition(' ')[0]} {text}"
        elif candidate == UNQUANTIZED:
            text = "float"
        shade = 0.0
        if value is not None and high > low:
            shade = (math.log2(max(1.0, value)) - low) / (high - low)
        place = len(blocks) if block is None else blocks.index(block)
        spots[place, columns.index(kind)] = Spot(text, shade)
    return Map(
        "allocation",
        f"Bits chosen for each matrix of {row.label}, blocks by modules",
        f"{row.label}: bits chosen for each matrix. Darker is more bits.",
        tuple(rows),
        tuple(columns),
        spots,
    )
