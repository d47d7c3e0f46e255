"""The tables as files: CSV and Parquet.

`results` has one row for each row of the report: a cell, or repetitions merged (means; their number
is in `repetitions`, the cells in `cells`). `values` has one row a value of every single cell. Two
protocols never share a column: the protocol that most cells used keeps the bare name and is stated
in `<family>_protocol`; any other has a column `<metric>__<protocol>`. A perplexity column carries
its protocol in its name. An empty field means that there is no such figure; `nan` and `inf` are
figures.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.record import read_records
from reports import protocols, words
from reports.gather import make_rows
from reports.rows import Row, family, kernels, machine, sequence
from reports.terminal import summary_text as summary_text

if TYPE_CHECKING:
    import pandas

AXES = ("cell", "model", "method", "bits", "group_size", "hardware", "status", "execution")
FIRST_METRICS = (
    *("quantize_seconds", "quantize_peak_bytes", "load_seconds", "artefact_bytes"),
    *("bits_per_weight", "peak_memory_bytes", "perplexity", "kl_mean", "top1_agreement"),
    *("prefill_tokens_per_second", "ttft_seconds", "decode_tokens_per_second", "tpot_seconds"),
)
"""Columns that are always there, in this order; `perplexity` stands for all its protocols."""

TEXTS = (
    *("label", "baseline", "suite", "data", "random_weights", "kernel", "notes", "errors"),
    *("command", "cell_key", "artefact_key", "machine", "started", "seconds"),
    *("repetitions", "cells"),
)
INTEGER_KINDS = ("bytes", "count")


@dataclass(frozen=True)
class Name:
    """Where a (family, metric, protocol) stands in the wide table."""

    column: str
    main: bool


def column_names(rows: Sequence[Row]) -> dict[tuple[str, str, str], Name]:
    """Return the column of each (family, metric, protocol) found in `rows`."""
    found = Counter(
        (family(value), value.metric, value.protocol)
        for row in rows
        for value in row.values.values()
    )
    by_base: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for key in found:
        by_base[_base(*key)].append(key)
    taken = {*AXES, *TEXTS}
    names: dict[tuple[str, str, str], Name] = {}
    for base, keys in sorted(by_base.items()):
        ordered = sorted(keys, key=lambda key: (-found[key], words.natural(key[2]), key))
        for place, key in enumerate(ordered):
            main = place == 0 and base not in taken
            name = base if main else f"{base}__{key[2]}"
            taken.add(name)
            names[key] = Name(name, main)
    return names


def results(rows: Sequence[Row]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns in order, and one mapping a row; None is: no such figure."""
    names = column_names(rows)
    table = [_result(row, names) for row in rows]
    columns = [*AXES, *_metric_columns(names)]
    families = sorted({key for row in table for key in row} - {*columns, *TEXTS})
    columns += [*families, *TEXTS]
    return columns, [{name: row.get(name) for name in columns} for row in table]


def values(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one mapping a value, in the order of the rows and of their records."""
    names = column_names(rows)
    return [
        {
            "cell": row.record.cell,
            "model": row.model,
            "method": row.method,
            "bits": row.bits,
            "group_size": row.group_size,
            "hardware": row.hardware,
            "measure": value.measure,
            "metric": value.metric,
            "protocol": value.protocol,
            "value": float(value.value),
            "unit": value.unit,
            "higher_is_better": value.higher_is_better,
            "stderr": value.stderr,
            "samples": [float(sample) for sample in value.samples],
            "column": names[family(value), value.metric, value.protocol].column,
        }
        for merged in rows
        for row in merged.cells
        for value in row.values.values()
    ]


def results_csv(rows: Sequence[Row]) -> bytes:
    """Return `results` as CSV."""
    columns, table = results(rows)
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    integers = {name for name in columns if _integral(table, name)}
    for row in table:
        writer.writerow({name: _csv_field(row[name], name in integers) for name in columns})
    return file.getvalue().encode()


def results_parquet(rows: Sequence[Row]) -> bytes:
    """Return `results` as Parquet."""
    return parquet(_results_table(rows))


def values_parquet(rows: Sequence[Row]) -> bytes:
    """Return `values` as Parquet; `samples` is a list of float64."""
    return parquet(_values_table(rows))


def frames(runs_dir: Path) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Return `results` and `values` of the records under `runs_dir` as pandas tables.

    Columns are Arrow-backed, so that a missing figure (NA) stays apart from one that is NaN.
    Damaged records are left out, as in the report, which names them.
    """
    import pandas

    rows = make_rows(read_records(runs_dir)[0])
    tables = (_results_table(rows), _values_table(rows))
    results_, values_ = (t.to_pandas(types_mapper=pandas.ArrowDtype) for t in tables)
    return results_, values_


def _results_table(rows: Sequence[Row]) -> pa.Table:
    columns, table = results(rows)
    return pa.table([_array(name, table) for name in columns], names=columns)


def _values_table(rows: Sequence[Row]) -> pa.Table:
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("cell", "model", "method")),
            ("bits", pa.float64()),
            ("group_size", pa.int64()),
            *((name, pa.string()) for name in ("hardware", "measure", "metric", "protocol")),
            ("value", pa.float64()),
            ("unit", pa.string()),
            ("higher_is_better", pa.bool_()),
            ("stderr", pa.float64()),
            ("samples", pa.list_(pa.float64())),
            ("column", pa.string()),
        ]
    )
    return pa.Table.from_pylist(values(rows), schema=schema)


def _base(of_family: str, metric: str, protocol: str) -> str:
    if of_family == "tasks":
        return f"{protocols.task_of(protocol)}_{metric}"
    return f"{metric}_{protocol}" if of_family == "perplexity" else metric


def _metric_columns(names: Mapping[tuple[str, str, str], Name]) -> list[str]:
    """Return the columns of figures: the promised ones, then the rest by family and name."""
    columns: list[str] = []
    for metric in FIRST_METRICS:
        if metric == "perplexity":
            found = [name.column for key, name in names.items() if key[0] == "perplexity"]
            columns += sorted(found, key=words.natural)
        else:
            columns.append(metric)
    rest = sorted(
        (key[0], not name.main, words.natural(name.column), name.column)
        for key, name in names.items()
        if name.column not in columns
    )
    return columns + [name for *_, name in rest]


def _result(row: Row, names: Mapping[tuple[str, str, str], Name]) -> dict[str, Any]:
    record, config = row.record, row.record.config
    found: dict[str, Any] = {
        "cell": record.cell,
        "repetitions": len(row.cells),
        "cells": "; ".join(cell.record.cell for cell in row.cells),
        "model": row.model,
        "method": row.method,
        "bits": row.bits,
        "group_size": row.group_size,
        "hardware": row.hardware,
        "status": row.status,
        "execution": row.execution or None,
        "label": row.label,
        "random_weights": row.random_weights,
        "kernel": "; ".join(dict.fromkeys(str(k.get("kernel")) for k in kernels(row))) or None,
        "notes": "; ".join(map(str, sequence(record.details.get("notes")))) or None,
        "errors": "; ".join(f"{e.stage}: {e.message}" for e in row.errors) or None,
        "machine": machine(row) or None,
        "started": record.started or None,
        "seconds": float(record.seconds),
    }
    for name in ("baseline", "suite", "data", "command", "cell_key", "artefact_key"):
        found[name] = str(config[name]) if config.get(name) is not None else None
    used: dict[str, dict[str, None]] = defaultdict(dict)
    for value in row.values.values():
        of_family = family(value)
        place = names[of_family, value.metric, value.protocol]
        found[place.column] = float(value.value)
        if place.main and of_family != "perplexity" and value.protocol:
            key = protocols.task_of(value.protocol) if of_family == "tasks" else of_family
            used[f"{key}_protocol"][value.protocol] = None
    found.update({name: "; ".join(sorted(names_)) for name, names_ in used.items()})
    return found


def _integral(table: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether a column holds whole numbers and is written so."""
    if (
        name not in ("bits", "group_size", "repetitions")
        and words.kind(name.split("__")[0]) not in INTEGER_KINDS
    ):
        return False
    found = [row[name] for row in table if row[name] is not None]
    return bool(found) and all(isinstance(v, int | float) and v % 1 == 0 for v in found)


def _csv_field(value: Any, integral: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if integral else str(value)


def _array(name: str, table: Sequence[Mapping[str, Any]]) -> pa.Array:
    column = [row[name] for row in table]
    if name == "random_weights":
        return pa.array(column, pa.bool_())
    if (name in AXES and name not in ("bits", "group_size")) or name.endswith("_protocol"):
        return pa.array(column, pa.string())
    if name in TEXTS and name not in ("seconds", "repetitions"):
        return pa.array(column, pa.string())
    if _integral(table, name):
        return pa.array([None if v is None else int(v) for v in column], pa.int64())
    return pa.array(column, pa.float64())


def parquet(table: pa.Table) -> bytes:
    """Return `table` as a Parquet file."""
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream)
    return bytes(stream.getvalue().to_pybytes())
