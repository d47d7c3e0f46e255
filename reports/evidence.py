"""The section "Verdicts": for each figure of quality, what the samples say of every row.

One table a figure: the difference from the baseline with its interval, the corrected p, answers
lost and gained, the smallest difference that so many samples would show, and the verdict.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass

from harness.record import Value
from reports import protocols, words
from reports.rows import Group, family
from reports.summary import summary_columns
from reports.verdicts import Judgement, judge

UNSEEN = ("not distinguishable", "same answers")
"""Verdicts that a larger difference might hide behind."""

SMALLEST_P = 1e-4
"""P-values below this are written as below it: no bootstrap knows them better."""

LEGEND = (
    "Difference: the row minus the baseline on the same samples, with its 95 % interval; relative "
    "for a perplexity, in points for a share. p: that nothing differs, corrected over the rows "
    "of the table (Holm). Lost and gained: answers right in the baseline and wrong in the row, "
    "and the other way round. Visible from: the smallest difference that so many samples show "
    "four times in five.",
    "Worse, better: p below 5 %. Equivalent: the loss or gain is below 3 %, tested. Not "
    "distinguishable: these samples cannot tell, which is no proof of equality. Same answers: not "
    "one was answered otherwise, and so few prove no more. Differs: a divergence or an agreement, "
    "perfect for the unquantized model itself, moved, if by how little. Acceptable: the loss is "
    "below 3 % of the baseline's figure, unacceptable: above 5 %, each a one-sided test at 5 % of "
    "that row alone; not decided: neither is shown, or the row is not told from the baseline.",
)
REPEATED = (
    "Of a row of several repetitions each sample's mean over them is compared: such answers are "
    "no longer right or wrong, so a bootstrap stands in for McNemar's test and no flips are "
    "counted. The interval is over samples, not over seeds: how far another seed may lie stands "
    "beside the figure in the summary."
)


@dataclass(frozen=True)
class EvidenceLine:
    """One row's comparison with the baseline, as text.

    `numbers` are difference, p and the smallest visible difference, to sort by; NaN is none.
    """

    label: str
    difference: str
    interval: str
    p: str
    lost: str
    gained: str
    visible: str
    verdict: str
    tone: str
    rule: str
    numbers: tuple[float, float, float]


@dataclass(frozen=True)
class Evidence:
    """One figure: what was compared, a line a row, what the samples cannot show, who is missing."""

    title: str
    protocol: str
    samples: str
    test: str
    flips: bool
    ruled: bool
    counts: str
    lines: tuple[EvidenceLine, ...]
    limit: str
    left_out: tuple[str, ...]


def evidence(group: Group, detailed: bool = True) -> list[Evidence]:
    """Return the tables of the figures of quality that stand in the group's summary.

    Not `detailed`, they have no lines.
    """
    judged = judge(group)
    return [
        _table(group, judged.of(*key), detailed)
        for key in summary_columns(group)
        if judged.of(*key)
    ]


def legend(group: Group) -> tuple[str, ...]:
    """Return what a reader of the tables must know."""
    return (*LEGEND, REPEATED) if any(row.repetitions for row in group.measured) else LEGEND


def title_of(value: Value) -> str:
    """Return what a figure is called where its protocol stands elsewhere: `hellaswag acc_norm`."""
    if family(value) == "tasks":
        return f"{protocols.task_of(value.protocol)} {value.metric}"
    return words.title(value.metric)


def p_text(p: float) -> str:
    """Return a p-value with two digits."""
    return f"< {SMALLEST_P:g}" if p < SMALLEST_P else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def samples_text(one: Judgement) -> str:
    """Return how many samples stand behind a comparison: `1,000 questions`."""
    noun = {"tasks": "question", "generation": "prompt"}.get(family(one.value), "window")
    return words.count(one.comparison.n, noun)


def line(one: Judgement) -> EvidenceLine:
    """Return one comparison as text."""
    made = one.comparison
    unsure = not (math.isfinite(made.low) and math.isfinite(made.high))
    return EvidenceLine(
        label=one.row.label,
        difference=one.write(made.difference),
        interval=made.test if unsure else one.write_range(made.low, made.high),
        p=p_text(one.p_holm),
        lost=words.UNKNOWN if made.lost is None else f"{made.lost:,}",
        gained=words.UNKNOWN if made.gained is None else f"{made.gained:,}",
        visible=one.write(made.detectable).lstrip("+"),
        verdict=one.word,
        tone=one.tone,
        numbers=(
            made.difference,
            one.p_holm,
            math.nan if made.detectable is None else made.detectable,
        ),
        rule=words.UNKNOWN if one.acceptance is None or one.at_chance else one.acceptance,
    )


def _table(group: Group, column: list[Judgement], detailed: bool) -> Evidence:
    metric, protocol = column[0].value.metric, column[0].value.protocol
    uncompared = judge(group).uncompared
    return Evidence(
        title=title_of(column[0].value),
        protocol=protocol,
        samples=words.listed(list(dict.fromkeys(samples_text(one) for one in column))),
        test="; ".join(dict.fromkeys(one.comparison.test for one in column)),
        flips=any(one.comparison.lost is not None for one in column),
        ruled=any(one.acceptance is not None for one in column),
        counts=_counts(column),
        lines=tuple(line(one) for one in column) if detailed else (),
        limit=_limit(column),
        left_out=tuple(
            f"{row.label}: {uncompared[row.record.cell, metric, protocol]}"
            for row in group.measured
            if (row.record.cell, metric, protocol) in uncompared
        ),
    )


def _counts(column: list[Judgement]) -> str:
    """Return how many rows have which verdict: `2 better, 3 equivalent`."""
    found = Counter(one.word for one in column)
    order = ("identical", "same answers", "better", "equivalent", "not distinguishable", "differs")
    named = [*order, "worse", *sorted(found.keys() - {*order, "worse"})]
    return ", ".join(f"{found[name]} {name}" for name in named if found[name])


def _limit(column: list[Judgement]) -> str:
    """Return in words what the samples cannot show of the rows that are not told apart."""
    open_ = [
        (one.comparison.detectable, one)
        for one in column
        if one.word in UNSEEN and one.comparison.detectable is not None
    ]
    if not open_:
        return ""
    visible = [detectable for detectable, _ in open_]
    write = open_[0][1]
    middle = write.write(statistics.median(visible)).lstrip("+")
    low, high = min(visible), max(visible)
    samples = words.listed(list(dict.fromkeys(samples_text(one) for _, one in open_)))
    by_row = write.write_range(low, high).replace("+", "")
    spread = "" if write.write(low) == write.write(high) else f" (median; {by_row} by row)"
    rows = words.count(len(open_), "row is", "rows are")
    return (
        f"{rows} not told from the baseline: with {samples} a difference below "
        f"{middle}{spread} cannot be seen."
    )
