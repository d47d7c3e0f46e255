"""What was trained, how the loss fell, and how much of rounding's loss it took back.

From `details["method"]["training"]` of rows. Recovered is the share of the perplexity that the
untrained row of the same bits and group size loses: (untrained - row) / (untrained - baseline),
all three under one protocol. Untrained is rtn, of bitnet the row without training; of several
such rows the one with the lowest perplexity, which is the hardest to beat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports import words
from reports.blocks import Block, Curves, Field, Grid, Head, Line, number, plain
from reports.rows import Group, Row, mapping, sequence
from reports.rows import number as figure

UNTRAINED = {"bitnet": "bitnet"}
"""Kind of training -> the method whose untrained rows it is held against; all others: rtn."""


@dataclass(frozen=True)
class Recovery:
    """Share of what `untrained` loses that was recovered, with the perplexities it is made of."""

    untrained: Row
    share: float
    lost: float
    row: float
    baseline: float


def training_of(row: Row) -> Mapping[str, Any]:
    """Return what `row` says of its training, empty where it was not trained."""
    return mapping(mapping(row.record.details.get("method")).get("training"))


def training_blocks(group: Group) -> list[Block]:
    """Return the block of the group's trained rows, none where none was trained."""
    rows = [row for row in group.measured if training_of(row)]
    if not rows:
        return []
    lines = tuple(Line(row.label, points) for row in rows if (points := _curve(row)))
    kinds = dict.fromkeys(str(training_of(row).get("kind", "")) for row in rows)
    pictures: tuple[Curves, ...] = ()
    if lines:
        pictures = (
            Curves(
                "training",
                f"Training loss against steps of {words.listed([line.label for line in lines])}",
                "Training loss against steps. Losses of different kinds of training "
                f"({', '.join(kinds)}) are not comparable."
                if len(kinds) > 1
                else "Training loss against steps.",
                "steps",
                "training loss, nats",
                lines,
            ),
        )
    return [
        Block(
            "Training",
            tuple(_sentence(group, row) for row in rows),
            pictures,
            (_table(group, rows),),
            "Recovered: of the perplexity that the untrained row of the same bits and group size "
            "loses to the baseline, the share that the trained row does not lose. Equal: largest "
            "difference between what the saved model says and what the trained one said, and "
            "what is allowed.",
        )
    ]


def recovery(group: Group, row: Row) -> Recovery | None:
    """Return how much of the untrained row's loss `row` recovered, None where it cannot be told."""
    protocol = group.main_protocol("perplexity")
    own = row.get("perplexity", protocol) if protocol else None
    if protocol is None or own is None:
        return None
    base = group.baseline_value(row, "perplexity", protocol)
    method = UNTRAINED.get(str(training_of(row).get("kind")), "rtn")
    others = [
        (value.value, other)
        for other in group.measured
        if other.plain_method == method
        and not training_of(other)
        and (other.bits, other.group_size) == (row.bits, row.group_size)
        and other.activation_bits == row.activation_bits
        and (value := other.get("perplexity", protocol)) is not None
    ]
    if base is None or not others:
        return None
    lost, untrained = min(others, key=lambda pair: pair[0])
    if not lost > base.value or not math.isfinite(own.value):
        return None
    part = 1.0 if math.isinf(lost) else (lost - own.value) / (lost - base.value)
    return Recovery(untrained, part, lost, own.value, base.value)


def _sentence(group: Group, row: Row) -> str:
    found = recovery(group, row)
    if found is None:
        return (
            f"{row.label}: how much of the loss of an untrained row it recovers cannot be told: "
            "this report has no such row of the same bits and group size that loses perplexity."
        )
    perplexities = (
        f"baseline {words.significant(found.baseline)}, {found.untrained.label} "
        f"{words.spell(found.lost, words.significant)}, trained {words.significant(found.row)}"
    )
    if found.share < 0:
        worse = f"it is worse than {found.untrained.label}"
        return f"{row.label} recovers nothing: {worse} ({perplexities})."
    beyond = ", and ends below the baseline" if found.share > 1 else ""
    return (
        f"{row.label} recovers {100 * found.share:.3g} % of the perplexity that "
        f"{found.untrained.label} loses{beyond} ({perplexities})."
    )


def _curve(row: Row) -> tuple[tuple[float, float], ...]:
    points = []
    for entry in sequence(training_of(row).get("curve")):
        step, loss = (*map(figure, sequence(entry)), None, None)[:2]
        if step is not None and loss is not None and math.isfinite(loss):
            points.append((step, loss))
    return tuple(points)


def _table(group: Group, rows: Sequence[Row]) -> Grid:
    heads = (
        *(Head("Row"), Head("Kind"), Head("Engine"), Head("Steps", numeric=True)),
        *(Head("Batch", "crops × tokens"), Head("Tokens seen", numeric=True)),
        *(Head("Learning rate", numeric=True), Head("Loss", "first to last, nats")),
        *(Head("Time", numeric=True), Head("Resumed at", "steps")),
        *(Head("Equal", "difference (allowed)"), Head("Recovered", numeric=True)),
    )
    return Grid("Runs", heads, tuple(_line(group, row) for row in rows))


def _line(group: Group, row: Row) -> tuple[Field, ...]:
    facts = training_of(row)
    curve, found = _curve(row), recovery(group, row)
    loss = words.UNKNOWN
    if curve:
        loss = f"{words.significant(curve[0][1])} to {words.significant(curve[-1][1])}"
    return (
        Field(row.label),
        Field(str(facts.get("kind") or words.UNKNOWN)),
        Field(str(facts.get("engine") or words.UNKNOWN)),
        plain(figure(facts.get("steps"))),
        Field(f"{facts.get('batch', words.UNKNOWN)} × {facts.get('seq_len', words.UNKNOWN)}"),
        plain(figure(facts.get("tokens_seen"))),
        plain(figure(facts.get("learning_rate"))),
        Field(loss),
        number("training_seconds", figure(facts.get("seconds"))),
        Field(", ".join(str(step) for step in sequence(facts.get("resumed_at"))) or "not resumed"),
        Field(equality(facts)),
        Field(words.UNKNOWN) if found is None else Field(f"{100 * found.share:.3g} %", found.share),
    )


def equality(facts: Mapping[str, Any]) -> str:
    """Return the check of the saved model against the trained one in words."""
    found = mapping(facts.get("equality"))
    difference, tolerance = figure(found.get("difference")), figure(found.get("tolerance"))
    if difference is None:
        return "not checked"
    text = words.spell(difference, words.significant)
    if tolerance is None:
        return text
    verdict = "within" if difference <= tolerance else "OUTSIDE"
    return f"{text} ({words.significant(tolerance)}), {verdict}"
