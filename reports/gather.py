"""Makes the rows and groups of a report from records: order, labels, repetitions merged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.record import Record, Value
from reports import words
from reports.repetitions import merged
from reports.rows import STATES, Group, Row, axes_label, family, kept_back, mapping, sequence

_RESOLVED_NODES = ("method", "model", "hardware", "suite", "data")
_BARE = {"observer": "{}", "scale_search": "{}", "samples": "{} samples", "calibration": "{}"}
"""Options whose value is told without its name where many options tell rows apart."""


def make_rows(records: Iterable[Record], repeat: str | None = None) -> list[Row]:
    """Return the rows of `records` in the order of the report: by group, the baseline first.

    Records of other jobs than `cell` (a sensitivity analysis) are no rows.

    Records that differ in what `repeat` names alone (`seed`, `calibration`, `none`; None: as each
    record's own configuration says) become one row.
    """
    neighbours: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in merged([_row(record) for record in records if is_row(record)], repeat):
        neighbours[row.model, row.hardware, row.label].append(row)
    labelled = [
        replace(row, label=label)
        for rows in neighbours.values()
        for row, label in zip(rows, _distinct_labels(rows), strict=True)
    ]
    return sorted(labelled, key=_order)


def make_groups(rows: Sequence[Row]) -> list[Group]:
    """Return the groups of `rows`, in their order."""
    members: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        members[row.model, row.hardware].append(row)
    return [Group(model, hardware, tuple(rows)) for (model, hardware), rows in members.items()]


def is_row(record: Record) -> bool:
    """Whether the record is of one grid point, quantized, loaded and measured."""
    return bool(record.config.get("job", "cell") == "cell")


def _row(record: Record) -> Row:
    row = Row(record, "", {}, _execution(record))
    values: dict[tuple[str, str], Value] = {}
    for value in record.values:
        if not kept_back(row, family(value)):
            values.setdefault((value.metric, value.protocol), value)
    return Row(record, axes_label(row), values, row.execution)


def _execution(record: Record) -> str:
    states = [str(mapping(k).get("execution")) for k in sequence(record.details.get("kernels"))]
    states.append(str(record.details.get("execution", "")))
    known = [state for state in states if state in STATES]
    return max(known, key=STATES.index, default="")


def _distinct_labels(rows: Sequence[Row]) -> list[str]:
    """Return labels that tell rows of equal axes apart, by the options in which they differ."""
    if len(rows) == 1:
        return [rows[0].label]
    options = [_options(row.record) for row in rows]
    keys = sorted({key for found in options for key in found})
    differing = [key for key in keys if len({found.get(key) for found in options}) > 1]
    labels = []
    for row, found in zip(rows, options, strict=True):
        shown = dict.fromkeys(f"{key.split('.')[-1]}={found.get(key, 'none')}" for key in differing)
        text = ", ".join(list(shown)[:2])
        labels.append(f"{row.label} ({text})" if text else row.label)
    if len(set(labels)) < len(labels):
        labels = _told_by_values(rows, options, differing)
    if len(set(labels)) == len(labels):
        return labels
    return [f"{label} [{row.record.cell}]" for label, row in zip(labels, rows, strict=True)]


def _told_by_values(
    rows: Sequence[Row], options: Sequence[Mapping[str, str]], differing: Sequence[str]
) -> list[str]:
    """Return labels with as many options as it takes, in few words: `mse, 512 samples, world`."""
    chosen: list[str] = []
    for key in sorted(differing, key=lambda key: (key.split(".")[-1] not in _BARE, key)):
        more = [*chosen, key]
        if _distinct(options, more) > _distinct(options, chosen):
            chosen = more
    labels = []
    for row, found in zip(rows, options, strict=True):
        names = [(key.split(".")[-1], found.get(key, "none")) for key in chosen]
        shown = [_BARE.get(name, f"{name}={{}}").format(value) for name, value in names]
        labels.append(f"{row.label} ({', '.join(shown)})" if shown else row.label)
    return labels


def _distinct(options: Sequence[Mapping[str, str]], keys: Sequence[str]) -> int:
    return len({tuple(found.get(key) for key in keys) for found in options})


def _options(record: Record) -> dict[str, str]:
    """Return the resolved options of the nodes that make a cell, flat: `method.symmetric`."""
    resolved = mapping(record.config.get("resolved"))
    options = {"suite": str(record.config.get("suite")), "data": str(record.config.get("data"))}
    for node in _RESOLVED_NODES:
        options.update(_flat(mapping(resolved.get(node)), node))
    text = mapping(record.details.get("calibration")).get("text")
    if text and "data.calibration" not in options:
        options["data.calibration"] = words.one_line(text)
    if "seed" in resolved:
        options["seed"] = str(resolved["seed"])
    return options


def _flat(found: Mapping[str, Any], above: str) -> dict[str, str]:
    options = {}
    for key, value in found.items():
        if isinstance(value, Mapping) and key != "measures":
            options.update(_flat(value, f"{above}.{key}"))
        elif key not in ("name", "_target_", "measures"):
            options[f"{above}.{key}"] = words.one_line(value)
    return options


def _order(row: Row) -> tuple[Any, ...]:
    bits = -(row.bits if row.bits is not None else _stored_bits(row))
    size = row.group_size if row.group_size is not None else 0
    # Per channel is the largest group.
    size = 1 << 40 if size == -1 else size
    return (
        row.model,
        row.hardware,
        not row.is_baseline,
        bits,
        words.natural(row.method),
        size,
        words.natural(row.label),
        row.record.cell,
    )


def _stored_bits(row: Row) -> float:
    """Return the bits a weight of a method that has no single width, 0 where they are unknown."""
    found = [*row.all_of("bits_per_weight"), *row.all_of("computed_bits_per_weight")]
    return found[0].value if found else 0.0
