"""Tables for a reader: one group of rows, one column a metric and protocol.

The best figure of a column of size, memory or speed is marked. A figure of quality is never
crowned: beside it stands what its samples say of it against the baseline (`reports.verdicts`).

The same columns go to the terminal, to Markdown and to HTML. What is compared with what:

- sizes and memory: the row over the baseline (`x0.27`);
- perplexity: the change in percent, a ratio where it is far off;
- task scores: the difference in points, a task's perplexity as that of a text;
- speed: only the `*_speedup` values, which the measuring process took by running the baseline in
  turns with the row; figures of two processes are never divided.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.record import Value
from reports import protocols, words
from reports.rows import QUALITY, Group, Row, family, kept_back, main_protocol
from reports.tasks import hierarchy
from reports.verdicts import judge

SPEEDUP_OF = {
    "prefill_tokens_per_second": "prefill_speedup",
    "decode_tokens_per_second": "decode_speedup",
}
RATIO_METRICS = ("artefact_bytes", "computed_bytes", "quantized_bytes", "peak_memory_bytes")
UNMARKED = ("kl_noise_floor", "copy_bytes_per_second", "timing_spread", "other_bytes")
"""Figures that describe the measurement or are no merit of the row: none is marked as best."""

ENCODER_METRICS = (
    *("embedding_cosine", "similarity_rank_agreement", "masked_perplexity"),
    *("masked_top1_agreement", "latency_seconds", "latency_speedup"),
)
"""What the summary shows of encoders, which have no perplexity of a text."""

MAX_TASKS_IN_SUMMARY = 6
TASK_METRICS = ("acc_norm", "exact_match_strict", "pass@1", "acc")
"""Of a task's scores, the one that stands in the summary: the first of these that it has."""

STRICT, FLEXIBLE = "exact_match_strict", "exact_match_flexible"
FORMAT_STABILITY = "format_stability"
"""Strict minus flexible extraction: right answers lost because their format was not the asked."""

NOISY_SPREAD = 0.1
"""Interquartile range over median of the time per token above which a row is called noisy."""


@dataclass(frozen=True)
class Cell:
    """One figure of a table, as text.

    Attributes:
        value: the figure itself, None where there is none.
        text: the figure, or why there is none.
        spread: its standard error, as text, empty where there is none.
        compare: how it compares with the baseline's, empty where it does not.
        mark: `best` of the column; `next`: the best after the baseline; else empty.
        flag: what a reader must know before using the figure.
        verdict: what its samples say of it against the baseline, empty where nothing is tested.
        tone: the verdict as one word: `better`, `worse`, `even`, `open`, `moved`.
        repeats: how it varied over repetitions, empty where there are none.
    """

    value: float | None
    text: str
    spread: str = ""
    compare: str = ""
    mark: str = ""
    flag: str = ""
    verdict: str = ""
    tone: str = ""
    repeats: str = ""


@dataclass(frozen=True)
class Column:
    """One metric under one protocol, for all rows of a table.

    `note` says how much stands behind the figures: windows or questions, and whether they are a
    screening only.
    """

    metric: str
    protocol: str
    family: str
    head: str
    unit: str
    note: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Measured rows of one group, and columns that have a figure in at least one of them."""

    group: Group
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]


def summary_table(group: Group) -> Table:
    """Return the table that a choice is made from."""
    rows = group.measured
    wanted = summary_columns(group)
    return Table(group, rows, tuple(column(group, rows, *pair) for pair in wanted))


def summary_columns(group: Group) -> list[tuple[str, str]]:
    """Return (metric, protocol) of each column of the table that a choice is made from."""
    rows = group.measured
    wanted: list[tuple[str, str]] = []
    for metric in ("artefact_bytes", "computed_bytes", "bits_per_weight"):
        wanted += _main(rows, metric)
    if not any(metric == "bits_per_weight" for metric, _ in wanted):
        wanted += _main(rows, "computed_bits_per_weight")
    wanted += _main(rows, "peak_memory_bytes")
    wanted += protocols_of(rows, "perplexity", {"perplexity"})[:1]
    wanted += _main(rows, "kl_mean") + _main(rows, "top1_agreement")
    for metric in ENCODER_METRICS:
        wanted += _main(rows, metric)
    wanted += _main(rows, "prefill_tokens_per_second") + _main(rows, "decode_tokens_per_second")
    wanted += one_score_a_task(rows)[:MAX_TASKS_IN_SUMMARY]
    return wanted + _main(rows, "quantize_seconds") + _main(rows, "quantize_peak_bytes")


def detail_table(group: Group, families: set[str], first: Sequence[str] = ()) -> Table:
    """Return a table of every metric of `families` under every protocol, those in `first` first.

    Rows without any of them are left out.
    """
    if families == {"tasks"}:
        tasks = hierarchy(group.rows)
        wanted = [
            pair
            for pair in task_columns(group.rows)
            if not tasks.is_part(protocols.task_of(pair[1]))
        ]
    else:
        others = {v.metric for r in group.rows for v in r.values.values() if family(v) in families}
        metrics = [*first, *sorted(others - {*first})]
        wanted = [pair for name in metrics for pair in protocols_of(group.rows, name, families)]
    rows = tuple(row for row in group.rows if any(row.get(*pair) for pair in wanted))
    columns = []
    for metric, protocol in wanted:
        columns.append(column(group, rows, metric, protocol))
        if metric == STRICT and (FLEXIBLE, protocol) in wanted:
            columns.append(_format_stability(rows, protocol))
    return Table(group, rows, tuple(columns))


def protocols_of(rows: Iterable[Row], metric: str, families: set[str]) -> list[tuple[str, str]]:
    """Return (metric, protocol) of every protocol that `metric` was measured by, in order."""
    found = Counter(
        value.protocol for row in rows for value in row.all_of(metric) if family(value) in families
    )
    order = sorted(found, key=lambda protocol: (-found[protocol], words.natural(protocol)))
    return [(metric, protocol) for protocol in order]


def task_columns(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Return (metric, protocol) of every task score, by task."""
    found = {
        (value.metric, value.protocol)
        for row in rows
        for value in row.values.values()
        if family(value) == "tasks"
    }
    return sorted(found, key=lambda pair: (words.natural(pair[1]), pair[0]))


def one_score_a_task(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (metric, protocol) of the main score of each task that is part of no other."""
    tasks = hierarchy(rows)
    by_protocol: dict[str, list[str]] = defaultdict(list)
    for metric, protocol in task_columns(rows):
        if tasks.is_top(protocols.task_of(protocol)):
            by_protocol[protocol].append(metric)
    return [
        (next((m for m in TASK_METRICS if m in metrics), metrics[0]), protocol)
        for protocol, metrics in by_protocol.items()
    ]


def column(group: Group, rows: Sequence[Row], metric: str, protocol: str) -> Column:
    """Return the column of `metric` under `protocol`, with one unit for all its figures."""
    values = [row.get(metric, protocol) for row in rows]
    present = [value for value in values if value is not None]
    of_family = family(present[0])
    format_ = words.column_format(metric, [value.value for value in present])
    marks = [""] * len(rows) if of_family in QUALITY else _marks(rows, values)
    cells = tuple(
        Cell(None, _absent_text(row, of_family, metric))
        if value is None
        else _cell(group, row, value, format_, mark)
        for row, value, mark in zip(rows, values, marks, strict=True)
    )
    head = words.title(metric)
    if of_family == "tasks":
        head = f"{protocols.task_of(protocol)} {metric}"
    note = _note(of_family, protocol, present)
    return Column(metric, protocol, of_family, head, format_.unit, note, cells)


def absent(row: Row, of_family: str) -> str:
    """Return why `row` has no figure of the family."""
    reason = kept_back(row, of_family)
    if reason:
        return reason
    if any(error.stage.startswith(of_family) for error in row.errors):
        return "failed"
    return words.NOT_MEASURED


def compare(group: Group, row: Row, value: Value) -> str:
    """Return how `value` of `row` compares with the baseline's, empty where it may not."""
    if value.metric in SPEEDUP_OF:
        speedup = row.get(SPEEDUP_OF[value.metric], value.protocol)
        return words.ratio(speedup.value) if speedup is not None else ""
    if row.is_baseline:
        return ""
    other = group.baseline_value(row, value.metric, value.protocol)
    if other is None:
        return ""
    if family(value) == "tasks" and value.metric != "perplexity":
        is_share = words.kind(value.metric) == "share"
        return words.points(value.value - other.value) if is_share else ""
    if value.metric == "perplexity" and other.value > 0:
        return words.increase(value.value / other.value)
    if value.metric in RATIO_METRICS and other.value > 0:
        return words.ratio(value.value / other.value)
    return ""


def decodes_otherwise(row: Row) -> bool:
    """Whether a token of the row is decoded in another way than the baseline it was timed with.

    In transformers, that is, where the baseline runs in compiled code, or the other way round.
    """
    speed = row.record.details.get("speed", {})
    own, baseline = (str(speed.get(k) or "") for k in ("decoding", "baseline_decoding"))
    by_model = [said.startswith("transformers") for said in (own, baseline)]
    return bool(own and baseline) and by_model[0] != by_model[1]


def noisy(row: Row) -> bool:
    """Whether the row's timing spread says that its speed is not to be trusted."""
    return any(value.value > NOISY_SPREAD for value in row.all_of("timing_spread"))


def _absent_text(row: Row, of_family: str, metric: str) -> str:
    if row.is_baseline and metric in (*SPEEDUP_OF.values(), "latency_speedup"):
        return "is the baseline"
    return absent(row, of_family)


def _cell(group: Group, row: Row, value: Value, format_: words.Format, mark: str) -> Cell:
    flag = ""
    if value.metric == "decode_tokens_per_second":
        spread = row.get("timing_spread", value.protocol)
        if spread is not None and spread.value > NOISY_SPREAD:
            flag = f"noisy: spread {words.figure('timing_spread', spread.value)}"
    judged = judge(group).get(row, value.metric, value.protocol)
    return Cell(
        value.value,
        format_.write(value.value),
        format_.spread(value.stderr),
        compare(group, row, value),
        mark,
        flag,
        judged.text if judged is not None else "",
        judged.tone if judged is not None else "",
        _repeats(row, value, format_),
    )


def _repeats(row: Row, value: Value, format_: words.Format) -> str:
    """Return how a figure varied over repetitions: interval of the mean, standard deviation.

    That sizes are equal goes without saying.
    """
    spread = row.spreads.get((value.metric, value.protocol))
    among = "" if spread is None or spread.count == len(row.cells) else f" in {spread.count}"
    if spread is None or (spread.deviation == 0 and family(value) not in QUALITY and not among):
        return ""
    if spread.deviation == 0:
        return f"all equal{among}" if spread.count > 1 else "measured once"
    if spread.interval is None:
        return f"not finite{among}"
    half = (spread.interval[1] - spread.interval[0]) / 2
    return f"{format_.spread(half)} (s = {spread.deviation / format_.factor:.2g}){among}"


def _format_stability(rows: Sequence[Row], protocol: str) -> Column:
    """Return the column of strict minus flexible extraction, in points."""
    cells = []
    for row in rows:
        strict, flexible = row.get(STRICT, protocol), row.get(FLEXIBLE, protocol)
        if strict is None or flexible is None:
            cells.append(Cell(None, absent(row, "tasks")))
        else:
            points = 100 * (strict.value - flexible.value)
            cells.append(Cell(points, f"{points:+.1f}" if points else "0.0"))
    head = f"{protocols.task_of(protocol)} strict minus flexible"
    return Column(
        FORMAT_STABILITY, protocol, "tasks", head, "points", "format stability", tuple(cells)
    )


def _note(of_family: str, protocol: str, values: Sequence[Value]) -> str:
    screening = protocols.screening(protocol)
    if of_family not in ("tasks", "perplexity"):
        return screening
    counts = {len(value.samples) for value in values if value.samples}
    if screening or len(counts) != 1:
        # The limit of a group is that of each of its parts.
        parts = (
            of_family == "tasks"
            and len(counts) == 1
            and protocols.limit(protocol) not in (None, *counts)
        )
        return f"{screening} of each part, {counts.pop():,} in all" if parts else screening
    return words.count(counts.pop(), "question" if of_family == "tasks" else "window")


def _main(rows: Sequence[Row], metric: str) -> list[tuple[str, str]]:
    protocol = main_protocol(rows, metric)
    return [] if protocol is None else [(metric, protocol)]


def _marks(rows: Sequence[Row], values: Sequence[Value | None]) -> list[str]:
    """Return a mark for each row: the best of all, and where that is the baseline, the next."""
    wanted = {v.higher_is_better for v in values if v is not None and v.metric not in UNMARKED}
    finite = {
        index: value.value
        for index, value in enumerate(values)
        if value is not None and math.isfinite(value.value)
    }
    marks = [""] * len(rows)
    if len(wanted) != 1 or None in wanted or len(set(finite.values())) < 2:
        return marks
    choose = max if wanted == {True} else min
    best = choose(finite.values())
    for index, value in finite.items():
        marks[index] = "best" if value == best else ""
    others = {index: value for index, value in finite.items() if not rows[index].is_baseline}
    if others and choose(others.values()) != best:
        for index, value in others.items():
            marks[index] = "next" if value == choose(others.values()) else ""
    return marks
