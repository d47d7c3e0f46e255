from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.record import Record
from reports.gather import make_groups, make_rows
from reports.rows import kept_back, main_protocol
from tests.reports.synthetic import (
    PERPLEXITY,
    SPEED,
    Synthetic,
    changed,
    simulated,
    with_random_weights,
)


def by_cell(records: list[Record]) -> dict[str, Any]:
    return {row.record.cell: row for row in make_rows(records)}


def test_rows_start_with_the_baseline_and_go_from_many_bits_to_few(grid: list[Record]) -> None:
    labels = [row.label for row in make_rows(reversed(grid))]
    assert labels == [
        *("fp32", "bf16", "fp16", "int8_dynamic", "int8_static"),
        *(f"rtn {bits} bits g{size}" for bits in (8, 4, 3, 2) for size in (32, 128)),
    ]


def test_per_channel_is_named_and_comes_after_the_groups() -> None:
    made = Synthetic()
    records = [made.cell("rtn", 4, size, "packed", "k") for size in (-1, 128)]
    labels = [row.label for row in make_rows(records)]
    assert labels == ["rtn 4 bits g128", "rtn 4 bits per channel"]


def test_rows_of_equal_axes_are_told_apart_by_the_option_that_differs() -> None:
    record = Synthetic().cell("rtn", 4, 32, "packed", "k")
    other = {"method": {"name": "rtn", "symmetric": True}}
    twin = replace(record, cell="twin", config={**record.config, "resolved": other})
    labels = {row.label for row in make_rows([record, twin])}
    assert labels == {"rtn 4 bits g32 (symmetric=False)", "rtn 4 bits g32 (symmetric=True)"}


def test_rows_of_equal_options_are_told_apart_by_their_cell() -> None:
    record = Synthetic().cell("rtn", 4, 32, "packed", "k")
    labels = {row.label for row in make_rows([record, replace(record, cell="twin")])}
    assert labels == {f"rtn 4 bits g32 [{record.cell}]", "rtn 4 bits g32 [twin]"}


def test_a_simulated_row_shows_quality_and_no_speed_memory_or_size(grid: list[Record]) -> None:
    row = by_cell([simulated(record) for record in grid])["embedded-rtn-4-32-cpu"]
    assert row.execution == "simulated"
    assert {value.measure for value in row.values.values()} == {
        *("perplexity", "divergence", "generation", "tasks", "quantize"),
    }
    assert kept_back(row, "speed") == "simulated"


def test_random_weights_show_no_quality(grid: list[Record]) -> None:
    row = by_cell([with_random_weights(record) for record in grid])["embedded-rtn-4-32-cpu"]
    measures = {value.measure for value in row.values.values()}
    assert measures == {"size", "memory", "quantize", "load", "speed"}
    assert kept_back(row, "tasks") == "random weights"


def test_a_row_is_only_as_good_as_its_worst_matrix() -> None:
    record = Synthetic().cell("rtn", 4, 32, "packed", "k")
    kernel = record.details["kernels"][0]
    kernels = [kernel, {**kernel, "execution": "dequantized"}]
    mixed = replace(record, details={**record.details, "kernels": kernels})
    assert make_rows([mixed])[0].execution == "dequantized"


def test_groups_are_models_on_hardware(grid: list[Record]) -> None:
    records = grid + Synthetic(hardware="cuda").grid() + Synthetic("other").grid()
    titles = [group.title for group in make_groups(make_rows(records))]
    assert titles == ["embedded on cpu", "embedded on cuda", "other on cpu"]


def test_a_row_is_compared_with_the_baseline_of_its_own_protocol_and_suite(
    grid: list[Record],
) -> None:
    full = [
        replace(
            changed(record, "perplexity", value=50.0 + index),
            cell=f"full-{record.cell}",
            config={**record.config, "suite": "full"},
        )
        for index, record in enumerate(grid)
    ]
    (group,) = make_groups(make_rows(grid + full))
    row = next(row for row in group.rows if row.record.cell == "full-embedded-rtn-4-32-cpu")
    found = group.baseline_value(row, "perplexity", PERPLEXITY)
    assert found is not None
    assert found.value == 50.0
    assert group.baseline_value(row, "perplexity", "another_protocol") is None


def test_a_baseline_of_another_version_of_the_model_is_none(grid: list[Record]) -> None:
    details = {**grid[0].details, "model": {"sha256": "another"}}
    (group,) = make_groups(make_rows([replace(grid[0], details=details), *grid[1:]]))
    assert group.baseline_value(group.rows[3], "perplexity", PERPLEXITY) is None


def test_the_main_protocol_is_the_most_common_then_the_plainest(grid: list[Record]) -> None:
    few = "prompt128_depth256_batch16"
    rows = make_rows([changed(grid[0], "tpot_seconds", protocol=few), *grid[1:]])
    assert main_protocol(rows, "tpot_seconds") == SPEED
    tie = [changed(grid[0], "tpot_seconds", protocol=few), grid[1]]
    assert main_protocol(make_rows(tie), "tpot_seconds") == SPEED
    assert main_protocol(rows, "no_such_metric") is None


def test_a_record_with_nothing_in_it_is_a_row() -> None:
    strange = Record(cell="c", status="ok", config={}, details={"kernels": 3, "model": "x"})
    (row,) = make_rows([strange])
    assert (row.label, row.execution, row.bits, row.group_size) == ("c", "", None, None)
    assert not row.is_baseline
