"""Whether engines that run the same unquantized model compute the same thing.

Rows whose weights are all stored as they were, in one floating type (FP16 in PyTorch, a GGUF of
type F16, an ONNX graph in FP16), hold the same model. Where their perplexity or divergence differ
by more than rounding can explain, an export or an engine is wrong, and every quantized row of that
engine inherits the error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from harness.record import Value
from reports import words
from reports.rows import Group, Row

PERPLEXITY_TOLERANCE = 0.001
"""Relative difference of perplexity between two engines, above which one of them is wrong."""

KL_TOLERANCES = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-3}
"""Nats, by floating type: how far two engines' mean KL from the one reference may be apart. They
round activations in different places; seen on small models: 1e-11, 2e-6 and 1e-4."""

FIRST_RUNTIME = "pytorch"
METRICS = ("perplexity", "kl_mean")


@dataclass(frozen=True)
class EngineLine:
    """One row: its engine, its figures in the order of the table's columns, and the verdict."""

    label: str
    runtime: str
    cells: tuple[str, ...]
    verdict: str


@dataclass(frozen=True)
class EngineTable:
    """Rows that store the same weights in the type `dtype`; columns are (metric, protocol)."""

    dtype: str
    columns: tuple[tuple[str, str], ...]
    lines: tuple[EngineLine, ...]
    differing: tuple[str, ...]


def engine_tables(group: Group) -> list[EngineTable]:
    """Return one table for each floating type that more than one engine ran in `group`."""
    by_dtype: dict[str, list[Row]] = defaultdict(list)
    for row in group.measured:
        dtype = row.record.details.get("unquantized")
        if isinstance(dtype, str) and dtype in KL_TOLERANCES and _runtime(row):
            by_dtype[dtype].append(row)
    return [
        _table(dtype, sorted(rows, key=lambda row: _runtime(row) != FIRST_RUNTIME))
        for dtype, rows in sorted(by_dtype.items())
        if len({_runtime(row) for row in rows}) > 1
    ]


def engine_warnings(group: Group) -> list[str]:
    """Return a sentence for each floating type whose engines do not agree."""
    return [
        f"{group.title}: the same {table.dtype} model does not give the same figures on every "
        f"engine ({words.listed(list(table.differing))}). An export or an engine is wrong: do not "
        "compare quantized rows across these engines before you know which."
        for table in engine_tables(group)
        if table.differing
    ]


def _runtime(row: Row) -> str:
    return str(row.record.details.get("runtime") or "")


def _table(dtype: str, rows: Sequence[Row]) -> EngineTable:
    columns = tuple(
        dict.fromkeys(
            (metric, value.protocol)
            for metric in METRICS
            for row in rows
            for value in row.all_of(metric)
        )
    )
    lines, differing = [], []
    for row in rows:
        values = [row.get(*column) for column in columns]
        firsts = [rows[0].get(*column) for column in columns]
        apart = any(
            _apart(metric, value, first, dtype)
            for (metric, _), value, first in zip(columns, values, firsts, strict=True)
        )
        if apart:
            differing.append(row.label)
        compared = any(value is not None for value in values)
        verdict = "differs" if apart else "agrees" if compared else words.NOT_MEASURED
        cells = tuple(
            _cell(metric, value, first, row is rows[0])
            for (metric, _), value, first in zip(columns, values, firsts, strict=True)
        )
        lines.append(EngineLine(row.label, _runtime(row), cells, verdict))
    return EngineTable(dtype, columns, tuple(lines), tuple(differing))


def _apart(metric: str, value: Value | None, first: Value | None, dtype: str) -> bool:
    """Whether `value` is further from the first engine's than rounding explains."""
    if value is None or first is None:
        return False
    tolerance = PERPLEXITY_TOLERANCE * first.value
    if metric == "kl_mean":
        tolerance = KL_TOLERANCES[dtype]
    # Written so that NaN, too, is a difference.
    return not abs(value.value - first.value) <= tolerance


def _cell(metric: str, value: Value | None, first: Value | None, is_first: bool) -> str:
    if value is None:
        return words.NOT_MEASURED
    if metric == "kl_mean":
        return f"{value.value:.2g}"
    text = f"{value.value:.5g}"
    if first is None or is_first:
        return text
    return f"{text} ({100 * (value.value / first.value - 1):+.4f} %)"
