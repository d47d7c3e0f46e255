"""Rows that differ only in how they were calibrated: observer, samples, text.

Which text is like what the model will read is the reader's to say; the record knows its name only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from reports import words
from reports.blocks import Block, Field, Grid, Head, plain
from reports.rows import Group, Row, axes_label, mapping

OBSERVERS = ("observer", "scale_search", "percentile", "activation_observer", "weight_observer")
"""Options that say how a range is chosen from what was seen."""


def calibration_text(row: Row) -> str:
    """Return the name of the text that `row` was calibrated on, empty where it was on none."""
    facts = mapping(row.record.details.get("calibration"))
    return str(facts.get("text") or facts.get("source") or "")


def calibration_blocks(group: Group) -> list[Block]:
    """Return a block for each set of rows that differ in their calibration alone."""
    grids = tuple(_grid(group, rows) for rows in _sets(group))
    if not grids:
        return []
    return [
        Block(
            "Calibration compared",
            ("These rows differ only in what they were calibrated on, and how.",),
            (),
            grids,
            "Which text is representative of what the model will read is for the reader to say. "
            "Rows with two differing settings show both at once: compare those that differ in one.",
        )
    ]


def spreads(group: Group) -> list[tuple[float | None, float | None]]:
    """Return for each set how far its KL varies: by text, and by number of samples.

    Largest over smallest KL of rows that differ in that alone, None where none do.
    """
    protocol = group.main_protocol("kl_mean")
    if protocol is None:
        return []
    found = []
    for rows in _sets(group):
        by_text: dict[object, list[float]] = defaultdict(list)
        by_count: dict[object, list[float]] = defaultdict(list)
        for row in rows:
            value = row.get("kl_mean", protocol)
            if value is not None and value.value > 0:
                by_text[_observer(row), _samples(row)].append(value.value)
                by_count[_observer(row), calibration_text(row)].append(value.value)
        found.append((_widest(by_text), _widest(by_count)))
    return found


def _widest(of_sets: Mapping[object, list[float]]) -> float | None:
    ratios = [max(values) / min(values) for values in of_sets.values() if len(values) > 1]
    return max(ratios, default=None)


def _sets(group: Group) -> list[list[Row]]:
    """Return the sets of rows that differ in their calibration alone."""
    sets: dict[str, list[Row]] = defaultdict(list)
    for row in group.measured:
        if mapping(row.record.details.get("calibration")):
            sets[_rest(row)].append(row)
    return [rows for rows in sets.values() if _differ(rows)]


def _differ(rows: list[Row]) -> bool:
    return len({(_observer(row), _samples(row), calibration_text(row)) for row in rows}) > 1


def _rest(row: Row) -> str:
    """Return everything that makes `row` but its calibration, as a key."""
    resolved = mapping(row.record.config.get("resolved"))
    method = dict(_without(mapping(resolved.get("method"))))
    axes = [row.record.config.get(name) for name in ("method", "bits", "group_size", "suite")]
    return json.dumps([axes, method, resolved.get("seed")], sort_keys=True, default=str)


def _without(node: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        key: _without(value) if isinstance(value, Mapping) else value
        for key, value in node.items()
        if key not in (*OBSERVERS, "calibration")
    }


def _observer(row: Row) -> str:
    method = mapping(mapping(row.record.config.get("resolved")).get("method"))
    shown = [
        f"{method[name]}" if name in ("observer", "scale_search") else f"{name} {method[name]}"
        for name in OBSERVERS
        if method.get(name) is not None
        and (name != "percentile" or "percentile" in map(str, method.values()))
    ]
    return ", ".join(shown) or words.UNKNOWN


def _samples(row: Row) -> tuple[float, float]:
    facts = mapping(row.record.details.get("calibration"))
    samples, length = (facts.get(name) for name in ("samples", "seq_len"))
    return (
        float(samples) if isinstance(samples, int | float) else 0.0,
        float(length) if isinstance(length, int | float) else 0.0,
    )


def _grid(group: Group, rows: list[Row]) -> Grid:
    heads = (
        *(Head("Observer"), Head("Text"), Head("Samples", "of tokens", True)),
        *(Head("Perplexity", numeric=True), Head("over the baseline", numeric=True)),
        *(Head("KL", "nats", True), Head("Row")),
    )
    lines = []
    quality, divergence = (group.main_protocol(name) for name in ("perplexity", "kl_mean"))
    ordered = sorted(rows, key=lambda r: (_observer(r), calibration_text(r), _samples(r), r.label))
    for row in ordered:
        value = row.get("perplexity", quality) if quality else None
        kl = row.get("kl_mean", divergence) if divergence else None
        base = group.baseline_value(row, "perplexity", quality) if quality else None
        ratio = value.value / base.value if value and base and base.value > 0 else None
        samples, length = _samples(row)
        lines.append(
            (
                Field(_observer(row)),
                Field(calibration_text(row) or words.UNKNOWN),
                Field(f"{samples:.0f} of {length:.0f}", samples),
                plain(None if value is None else value.value, words.NOT_MEASURED),
                Field(words.UNKNOWN) if ratio is None else Field(words.increase(ratio), ratio),
                plain(None if kl is None else kl.value, words.NOT_MEASURED),
                Field(row.label),
            )
        )
    title = f"{axes_label(rows[0])}: observer, text and samples"
    return Grid(title, heads, tuple(lines))
