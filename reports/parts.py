"""Groups of tasks part by part (the subjects of MMLU): parts go down, rows of the report across.

Parts are shown and not judged: few questions stand behind each, and over so many parts some would
differ by chance. The group's own score, which holds all their questions, carries the verdict.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from reports import protocols, words
from reports.rows import Group
from reports.summary import TASK_METRICS, absent, compare, task_columns
from reports.tasks import hierarchy


@dataclass(frozen=True)
class Part:
    """One part: its name, how many questions it has, and (score, change) for each row."""

    name: str
    questions: str
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Parts:
    """The parts of one group of tasks, in one metric; `labels` name the rows across.

    `metric` says its unit too, and whether the parts are a screening.
    """

    group: str
    metric: str
    labels: tuple[str, ...]
    parts: tuple[Part, ...]


def parts(group: Group) -> list[Parts]:
    """Return a table for each group of tasks whose parts were measured."""
    tasks = hierarchy(group.rows)
    of_part: dict[str, list[str]] = defaultdict(list)
    for metric, protocol in task_columns(group.rows):
        if tasks.is_part(protocols.task_of(protocol)):
            of_part[protocol].append(metric)
    tables: dict[tuple[str, str], list[str]] = defaultdict(list)
    for protocol, metrics in of_part.items():
        metric = next((name for name in TASK_METRICS if name in metrics), metrics[0])
        tables[tasks.top(protocols.task_of(protocol)), metric].append(protocol)
    return [_table(group, name, metric, found) for (name, metric), found in tables.items()]


def _table(group: Group, name: str, metric: str, of_parts: list[str]) -> Parts:
    rows = [row for row in group.rows if any(row.get(metric, part) for part in of_parts)]
    values = [value for row in rows for part in of_parts if (value := row.get(metric, part))]
    format_ = words.column_format(metric, [value.value for value in values])
    found = []
    for protocol in of_parts:
        cells, counts = [], set()
        for row in rows:
            value = row.get(metric, protocol)
            if value is None:
                cells.append((absent(row, "tasks"), ""))
                continue
            counts.add(len(value.samples))
            change = compare(group, row, value).removesuffix(" points")
            cells.append((format_.write(value.value), change))
        task = protocols.task_of(protocol)
        asked = f"{counts.pop():,}" if len(counts) == 1 else words.UNKNOWN
        found.append(Part(task.removeprefix(f"{name}_"), asked, tuple(cells)))
    notes = [metric, format_.unit, *dict.fromkeys(protocols.screening(part) for part in of_parts)]
    unit = ", ".join(note for note in notes if note)
    return Parts(name, unit, tuple(row.label for row in rows), tuple(found))
