"""Comparisons as files and on the terminal: each row with its baseline, or any two rows.

`comparisons.csv` and `comparisons.parquet` have one row for each (cell, metric, protocol) that was
compared with the baseline: the columns are those of `reports.stats.Comparison`, p corrected over
the rows of the metric and protocol, and the verdicts.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from harness.record import Record
from reports import protocols, stats, words
from reports.evidence import line, samples_text
from reports.gather import make_groups, make_rows
from reports.rows import Group, Row, family
from reports.table import parquet
from reports.tasks import hierarchy
from reports.verdicts import Judgement, compared, judge, judgement, pair

_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("cell", "model", "hardware", "label", "baseline")),
        *((name, pa.string()) for name in ("family", "metric", "protocol", "scale")),
        ("n", pa.int64()),
        *((name, pa.float64()) for name in ("value", "baseline_value", "difference")),
        *((name, pa.float64()) for name in ("low", "high", "loss", "loss_low", "loss_high")),
        *((name, pa.float64()) for name in ("p", "p_holm")),
        ("test", pa.string()),
        *((name, pa.int64()) for name in ("lost", "gained")),
        ("detectable", pa.float64()),
        *((name, pa.string()) for name in ("verdict", "acceptance")),
        ("baseline_at_chance", pa.bool_()),
    ]
)


class UnknownRowError(ValueError):
    """Two rows cannot be compared; the message is one sentence for the user."""


def comparisons(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return one mapping a comparison with the baseline, in the order of the rows."""
    found = []
    for group in groups:
        judged = judge(group).found.values()
        places = {row.record.cell: place for place, row in enumerate(group.rows)}
        found += sorted(judged, key=lambda one: places[one.row.record.cell])
    return [_entry(one) for one in found]


def comparisons_csv(groups: Sequence[Group]) -> bytes:
    """Return `comparisons` as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, _SCHEMA.names, lineterminator="\n")
    writer.writeheader()
    for entry in comparisons(groups):
        entry["baseline_at_chance"] = str(entry["baseline_at_chance"]).lower()
        writer.writerow(entry)
    return file.getvalue().encode()


def comparisons_parquet(groups: Sequence[Group]) -> bytes:
    """Return `comparisons` as Parquet."""
    return parquet(pa.Table.from_pylist(comparisons(groups), schema=_SCHEMA))


def compare_text(
    records: Sequence[Record], labels: tuple[str, str], repeat: str | None, width: int | None
) -> str:
    """Return the comparison of two rows, named by their labels, on every figure both have.

    Raises:
        UnknownRowError: there is no such row, or no group has both.
    """
    groups = make_groups(make_rows(records, repeat))
    found = []
    for group in groups:
        by_label = {row.label: row for row in group.measured}
        if all(label in by_label for label in labels):
            found.append(_pair_text(group, (by_label[labels[0]], by_label[labels[1]]), width))
    if not found:
        raise UnknownRowError(_why_not(groups, labels))
    return "\n".join(found)


def _entry(one: Judgement) -> dict[str, Any]:
    made = one.comparison
    return {
        "cell": one.row.record.cell,
        "model": one.row.model,
        "hardware": one.row.hardware,
        "label": one.row.label,
        "baseline": one.baseline.record.cell,
        "family": family(one.value),
        "metric": one.value.metric,
        "protocol": one.value.protocol,
        "scale": one.scale,
        "n": made.n,
        "value": made.first,
        "baseline_value": made.second,
        **{name: getattr(made, name) for name in ("difference", "low", "high")},
        **{name: getattr(made, name) for name in ("loss", "loss_low", "loss_high", "p")},
        "p_holm": one.p_holm,
        **{name: getattr(made, name) for name in ("test", "lost", "gained", "detectable")},
        "verdict": one.word,
        "acceptance": one.acceptance,
        "baseline_at_chance": one.at_chance,
    }


def _pair_text(group: Group, rows: tuple[Row, Row], width: int | None) -> str:
    first, second = rows
    tasks = hierarchy(group.rows)
    keys = [
        key
        for key, value in first.values.items()
        if key in second.values
        and compared(value)
        and not tasks.is_part(protocols.task_of(value.protocol))
    ]
    made, left_out = [], []
    for metric, protocol in keys:
        found = pair(first, second, metric, protocol)
        if isinstance(found, str):
            left_out.append(f"{metric}, {protocol}: not compared, {found}")
        else:
            made.append((first.values[metric, protocol], found))
    adjusted = stats.holm([found.p for _, found in made])
    table = Table(
        Column("figure", overflow="fold"),
        *("samples", "A", "B", "A minus B", "95 % interval", "p", "lost, gained"),
        *("visible from", "verdict on A", "rule"),
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for (value, found), p_holm in zip(made, adjusted, strict=True):
        one = judgement(rows, value, found, p_holm)
        shown = line(one)
        format_ = words.column_format(value.metric, [found.first, found.second])
        table.add_row(
            f"{value.metric}\n{value.protocol}",
            samples_text(one),
            *(f"{format_.write(x)} {format_.unit}".rstrip() for x in (found.first, found.second)),
            *(shown.difference, shown.interval.removesuffix(" points").removesuffix(" %")),
            *(shown.p, f"{shown.lost}, {shown.gained}"),
            *(shown.visible, shown.verdict, shown.rule),
        )
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    with console.capture() as text:
        console.print(f"{group.title}\nA: {first.label}\nB: {second.label}")
        if made:
            console.print(table)
            console.print(
                "p: Holm over the figures of this table. The rule (a loss below 3 % is "
                "acceptable, above 5 % is not) takes B as what A is held against."
            )
        else:
            console.print("They share no figure that stands on the same samples.")
        for sentence in left_out:
            console.print(sentence)
    return text.get()


def _why_not(groups: Sequence[Group], labels: tuple[str, str]) -> str:
    known = list(dict.fromkeys(row.label for group in groups for row in group.measured))
    for label in labels:
        if label not in known:
            close = difflib.get_close_matches(label, known, 5, 0.4) or known[:5]
            names = ", ".join(repr(name) for name in close)
            return f"no measured row is called {label!r}; close ones are: {names}"
    return f"{labels[0]!r} and {labels[1]!r} are in no group together, so nothing pairs them"
