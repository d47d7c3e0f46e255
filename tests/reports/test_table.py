from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from harness.record import Record, Value, write_record
from reports import table
from reports.gather import make_rows
from tests.reports.synthetic import PERPLEXITY, SPEED, changed

PROMISED = [
    *("cell", "model", "method", "bits", "group_size", "hardware", "status", "execution"),
    *("quantize_seconds", "quantize_peak_bytes", "load_seconds", "artefact_bytes"),
    *("bits_per_weight", "peak_memory_bytes", f"perplexity_{PERPLEXITY}", "kl_mean"),
    *("top1_agreement", "prefill_tokens_per_second", "ttft_seconds", "decode_tokens_per_second"),
    "tpot_seconds",
]


def read_csv(records: list[Record]) -> tuple[list[str], dict[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(table.results_csv(make_rows(records)).decode()))
    rows = {row["cell"]: row for row in reader}
    return list(reader.fieldnames or ()), rows


def read_parquet(content: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(io.BytesIO(content)).to_pylist()
    return found


def test_the_promised_columns_come_first(sweep: list[Record]) -> None:
    columns, rows = read_csv(sweep)
    assert columns[: len(PROMISED)] == PROMISED
    assert len(rows) == len(sweep)
    assert len(set(columns)) == len(columns)


def test_promised_columns_are_there_without_a_single_value() -> None:
    columns, rows = read_csv([Record(cell="c", status="failed", config={"method": "rtn"})])
    assert columns[: len(PROMISED) - 1] == [n for n in PROMISED if not n.startswith("perplexity")]
    assert rows["c"]["decode_tokens_per_second"] == ""


def test_one_row_a_cell_with_its_figures(grid: list[Record]) -> None:
    row = read_csv(grid)[1]["embedded-rtn-4-128-cpu"]
    found = {value.metric: value.value for value in grid[8].values}
    assert row["artefact_bytes"] == str(int(found["artefact_bytes"]))
    assert float(row[f"perplexity_{PERPLEXITY}"]) == found["perplexity"]
    assert (row["bits"], row["group_size"], row["execution"]) == ("4", "128", "packed")
    assert row["speed_protocol"] == SPEED
    assert row["command"].startswith("python run.py")
    assert row["cell_key"] == "key-rtn-4-128"
    assert float(row["endings_acc"]) <= 1


def test_infinite_and_nan_are_figures_and_absent_is_empty(grid: list[Record]) -> None:
    records = [
        changed(grid[0], "perplexity", value=math.inf),
        changed(grid[1], "perplexity", value=math.nan),
        replace(grid[2], values=()),
    ]
    rows = read_csv(records)[1]
    column = f"perplexity_{PERPLEXITY}"
    found = [rows[record.cell][column] for record in records]
    assert found == ["inf", "nan", ""]
    parquet = {row["cell"]: row for row in read_parquet(table.results_parquet(make_rows(records)))}
    assert parquet[records[0].cell][column] == math.inf
    assert math.isnan(parquet[records[1].cell][column])
    assert parquet[records[2].cell][column] is None


def test_simulated_rows_are_blank_in_speed_memory_and_size(sweep: list[Record]) -> None:
    rows = read_csv(sweep)[1]
    row = rows["embedded-rtn-2-32-cpu"]
    assert row["execution"] == "simulated"
    for name in ("artefact_bytes", "bits_per_weight", "peak_memory_bytes", "load_seconds"):
        assert row[name] == ""
    for name in ("decode_tokens_per_second", "ttft_seconds", "decode_speedup", "speed_protocol"):
        assert row[name] == ""
    assert float(row[f"perplexity_{PERPLEXITY}"]) > 1
    cells = {
        found["cell"]
        for found in read_parquet(table.values_parquet(make_rows(sweep)))
        if found["measure"] == "speed"
    }
    assert "embedded-rtn-2-32-cpu" not in cells
    assert "embedded-rtn-4-32-cpu" in cells


def test_random_weights_have_no_quality_and_say_so(sweep: list[Record]) -> None:
    row = read_csv(sweep)[1]["shape-0.5b-rtn-4-128-cpu"]
    assert row["random_weights"] == "true"
    for name in (f"perplexity_{PERPLEXITY}", "kl_mean", "top1_agreement", "endings_acc"):
        assert row[name] == ""
    assert float(row["decode_tokens_per_second"]) > 0


def test_two_protocols_never_share_a_column(grid: list[Record]) -> None:
    other = "prompt128_depth256_batch16"
    moved = changed(grid[3], "decode_tokens_per_second", protocol=other)
    columns, rows = read_csv([*grid[:3], moved, *grid[4:]])
    suffixed = f"decode_tokens_per_second__{other}"
    assert suffixed in columns
    assert rows[moved.cell]["decode_tokens_per_second"] == ""
    assert float(rows[moved.cell][suffixed]) > 0
    assert rows[grid[4].cell][suffixed] == ""
    assert other not in rows[moved.cell]["speed_protocol"]


def test_every_value_lands_in_a_column_of_one_protocol(sweep: list[Record]) -> None:
    second = Value("perplexity", "perplexity", "wikitext2_llamacpp_512", 7.0, "1", False)
    bits = Value("perplexity", "bits_per_byte", PERPLEXITY, 0.9, "bit", False)
    records = [replace(record, values=(*record.values, second, bits)) for record in sweep]
    protocols: dict[str, set[str]] = {}
    for value in table.values(make_rows(records)):
        protocols.setdefault(value["column"], set()).add(value["protocol"])
    assert all(len(found) == 1 for found in protocols.values())
    assert "perplexity_wikitext2_llamacpp_512" in protocols
    assert f"bits_per_byte_{PERPLEXITY}" in protocols


def test_a_metric_named_like_another_column_does_not_overwrite_it(grid: list[Record]) -> None:
    value = Value("odd", "status", "p", 3.0, "", None)
    columns, rows = read_csv([replace(grid[0], values=(value,))])
    assert rows[grid[0].cell]["status"] == "ok"
    assert rows[grid[0].cell]["status__p"] == "3.0"
    assert len(set(columns)) == len(columns)


def test_values_are_one_row_a_value(grid: list[Record]) -> None:
    rows = make_rows(grid)
    found = read_parquet(table.values_parquet(rows))
    assert len(found) == sum(len(record.values) for record in grid)
    wanted = next(v for v in grid[0].values if v.metric == "perplexity")
    (value,) = [
        row for row in found if row["cell"] == grid[0].cell and row["metric"] == "perplexity"
    ]
    assert value["samples"] == pytest.approx(list(wanted.samples))
    assert value["higher_is_better"] is False
    assert value["stderr"] == wanted.stderr
    assert value["protocol"] == PERPLEXITY


def test_csv_and_parquet_hold_the_same(sweep: list[Record]) -> None:
    columns, rows = read_csv(sweep)
    parquet = read_parquet(table.results_parquet(make_rows(sweep)))
    assert list(parquet[0]) == columns
    for row in parquet:
        for name, value in row.items():
            text = rows[row["cell"]][name]
            if value is None:
                assert text == ""
            elif isinstance(value, float):
                assert float(text) == value
            elif not isinstance(value, bool):
                assert text == str(value)


def test_pandas_tables_keep_missing_apart_from_nan(tmp_path: Path, sweep: list[Record]) -> None:
    perplexity = f"perplexity_{PERPLEXITY}"
    for record in sweep:
        write_record(record, tmp_path / record.cell)
    results, values = table.frames(tmp_path)
    columns, rows = read_csv(sweep)
    assert list(results.columns) == columns
    assert results["cell"].tolist() == list(rows)
    missing = [cell for cell, row in rows.items() if row[perplexity] == ""]
    assert results[results[perplexity].isna()]["cell"].tolist() == missing
    assert set(values["cell"]) <= set(rows)
    assert values["samples"].map(len).max() > 1
