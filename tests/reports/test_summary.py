from __future__ import annotations

import math
from dataclasses import replace

from harness.record import Record
from reports.gather import make_groups, make_rows
from reports.rows import Group
from reports.summary import Cell, Column, Table, detail_table, summary_table
from tests.reports.synthetic import PERPLEXITY, changed, partial, score_of, simulated


def group_of(records: list[Record]) -> Group:
    (group,) = make_groups(make_rows(records))
    return group


def column_of(table: Table, metric: str) -> Column:
    return next(column for column in table.columns if column.metric == metric)


def cell_of(table: Table, metric: str, label: str) -> Cell:
    index = [row.label for row in table.rows].index(label)
    return column_of(table, metric).cells[index]


def test_one_protocol_a_column_and_the_protocol_beside_it(grid: list[Record]) -> None:
    other = "prompt128_depth256_batch16"
    table = summary_table(group_of([changed(grid[0], "decode_tokens_per_second", protocol=other)]))
    assert column_of(table, "decode_tokens_per_second").protocol == other
    mixed = [changed(grid[0], "tpot_seconds", protocol=other), *grid[1:]]
    details = detail_table(group_of(mixed), {"speed"})
    columns = [column for column in details.columns if column.metric == "tpot_seconds"]
    assert len(columns) == 2
    assert columns[1].protocol == other
    assert columns[0].cells[0].value is None


def test_the_best_is_marked_and_after_a_best_baseline_the_next(grid: list[Record]) -> None:
    slow = [changed(r, "prefill_tokens_per_second", value=9.0 + i) for i, r in enumerate(grid[1:])]
    table = summary_table(group_of([grid[0], *slow]))
    assert cell_of(table, "prefill_tokens_per_second", "fp32").mark == "best"
    assert cell_of(table, "prefill_tokens_per_second", "rtn 2 bits g128").mark == "next"
    assert cell_of(table, "artefact_bytes", "rtn 2 bits g128").mark == "best"
    speeds = column_of(table, "decode_tokens_per_second").cells
    fastest = max(speeds, key=lambda cell: cell.value or 0)
    assert [cell for cell in speeds if cell.mark == "best"] == [fastest]
    marked = [cell for cell in column_of(table, "artefact_bytes").cells if cell.mark]
    assert len(marked) == 1


def test_infinite_values_and_columns_without_a_direction_are_not_best(grid: list[Record]) -> None:
    broken = changed(grid[0], "decode_tokens_per_second", value=math.inf)
    table = summary_table(group_of([broken, *grid[1:]]))
    assert cell_of(table, "decode_tokens_per_second", "fp32").mark == ""
    details = detail_table(group_of(grid), {"divergence", "speed"})
    assert not any(cell.mark for cell in column_of(details, "kl_noise_floor").cells)
    assert not any(cell.mark for cell in column_of(details, "copy_bytes_per_second").cells)


def test_a_single_figure_is_not_called_the_best(grid: list[Record]) -> None:
    table = summary_table(group_of(grid[:1]))
    assert {cell.mark for column in table.columns for cell in column.cells} == {""}


def test_what_is_compared_with_the_baseline(grid: list[Record]) -> None:
    table = summary_table(group_of(grid))
    size = cell_of(table, "artefact_bytes", "rtn 4 bits g32")
    assert size.compare == "×0.34"
    assert cell_of(table, "perplexity", "rtn 4 bits g32").compare.startswith("+")
    assert cell_of(table, "perplexity", "rtn 2 bits g128").compare.startswith("×")
    assert cell_of(table, "acc", "rtn 2 bits g128").compare.endswith("points")
    assert cell_of(table, "bits_per_weight", "rtn 4 bits g32").compare == ""
    assert {column.cells[0].compare for column in table.columns} == {""}


def test_speed_is_only_compared_where_the_baseline_took_turns(grid: list[Record]) -> None:
    table = summary_table(group_of(grid))
    speedup = next(v for v in grid[6].values if v.metric == "decode_speedup")
    assert cell_of(table, "decode_tokens_per_second", "rtn 8 bits g128").compare == (
        f"×{speedup.value:.2f}"
    )
    assert cell_of(table, "prefill_tokens_per_second", "rtn 8 bits g128").compare == ""


def test_an_absent_figure_says_why(grid: list[Record]) -> None:
    records = [grid[0], partial(grid[9]), simulated(grid[11])]
    records.append(
        replace(grid[5], values=tuple(v for v in grid[5].values if v.measure != "memory"))
    )
    table = summary_table(group_of(records))
    assert cell_of(table, "acc", "rtn 3 bits g32").text == "failed"
    assert cell_of(table, "artefact_bytes", "rtn 2 bits g32").text == "simulated"
    assert cell_of(table, "peak_memory_bytes", "rtn 8 bits g32").text == "not measured"
    details = detail_table(group_of(grid), {"speed"})
    assert cell_of(details, "decode_speedup", "fp32").text == "is the baseline"


def test_noisy_timing_is_flagged(grid: list[Record]) -> None:
    table = summary_table(group_of(grid))
    assert cell_of(table, "decode_tokens_per_second", "int8_static").flag == "noisy: spread 17.0 %"
    assert cell_of(table, "decode_tokens_per_second", "int8_dynamic").flag == ""


def test_the_head_says_how_much_stands_behind_a_figure(grid: list[Record]) -> None:
    table = summary_table(group_of(grid))
    assert column_of(table, "perplexity").note == "16 windows"
    assert column_of(table, "acc").note == "screening: first 100 questions"
    assert column_of(table, "acc").head == "endings acc"
    details = detail_table(group_of(grid), {"tasks"})
    assert cell_of(details, "acc", "fp32").spread.startswith("± ")
    whole = score_of("whole_5shot_limit2", "acc_norm", (1.0, 0.0, 1.0, 0.0, 1.0))
    group = group_of([replace(grid[0], values=(whole,))])
    note = column_of(detail_table(group, {"tasks"}), "acc_norm").note
    assert note == "screening: first 2 questions of each part, 5 in all"


def test_the_summary_has_one_perplexity_and_one_score_a_task(grid: list[Record]) -> None:
    def more(record: Record) -> Record:
        found = {value.metric: value for value in record.values}
        extra = [
            replace(found["acc"], metric=metric, protocol=protocol)
            for metric, protocol in (
                *(("exact_match_flexible", "sums_0shot"), ("exact_match_strict", "sums_0shot")),
                ("acc_norm", "facts_5shot_limit100"),
            )
        ]
        second = replace(found["perplexity"], protocol="embedded_llamacpp_512")
        return replace(record, values=(*record.values, second, *extra))

    group = group_of([more(record) for record in grid])
    columns = [(c.metric, c.protocol) for c in summary_table(group).columns]
    assert [c for c in columns if c[0] == "perplexity"] == [("perplexity", PERPLEXITY)]
    assert [c for c in columns if "shot" in c[1]] == [
        ("acc", "endings_0shot_limit100"),
        ("acc_norm", "facts_5shot_limit100"),
        ("exact_match_strict", "sums_0shot"),
    ]
    details = detail_table(group, {"perplexity", "tasks"}, ("perplexity",))
    assert len([c for c in details.columns if c.metric == "perplexity"]) == 2


def test_failed_rows_are_not_in_the_table(sweep: list[Record]) -> None:
    embedded = [record for record in sweep if record.config["model"] == "embedded"]
    labels = [row.label for row in summary_table(group_of(embedded)).rows]
    assert "rtn 3 bits g32" not in labels
    assert len(labels) == 12


def test_computed_sizes_stand_in_for_measured_ones(grid: list[Record]) -> None:
    records = [
        replace(
            changed(
                changed(record, "artefact_bytes", metric="computed_bytes", protocol="computed"),
                "bits_per_weight",
                metric="computed_bits_per_weight",
                protocol="computed",
            )
        )
        for record in grid
    ]
    table = summary_table(group_of(records))
    assert [column.metric for column in table.columns][:2] == [
        *("computed_bytes", "computed_bits_per_weight"),
    ]
    assert cell_of(table, "computed_bytes", "rtn 4 bits g32").compare == "×0.34"


def test_a_metric_nobody_foresaw_has_a_column(grid: list[Record]) -> None:
    odd = changed(grid[0], "timing_spread", metric="energy_joules", measure="energy")
    (column,) = detail_table(group_of([odd]), {"energy"}).columns
    assert (column.head, column.cells[0].text) == ("energy joules", "0.0300")
