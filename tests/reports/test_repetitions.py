"""Seeds and calibration texts as repetitions of one row."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest

from harness.record import Record
from reports import stats, table
from reports.gather import make_groups, make_rows
from reports.page import make_page
from reports.render import markdown
from reports.rows import Row
from reports.summary import detail_table, summary_table
from reports.verdicts import judge
from tests.reports.synthetic import (
    PERPLEXITY,
    Synthetic,
    changed,
    failed,
    partial,
    repetition,
    with_tasks,
)


def cell(seed: int, method: str = "gptq", bits: float = 4) -> Record:
    """Return one seed's cell, its figures its own."""
    made = Synthetic(seed=seed).cell(method, bits, 128, "packed", "k")
    return repetition(made, seed)


def baseline() -> Record:
    return Synthetic().cell("fp32", 32, None, "packed", "torch.linear")


def merged(*records: Record, repeat: str | None = None) -> Row:
    (row,) = make_rows(records, repeat)
    return row


def figures(records: list[Record], metric: str) -> list[float]:
    return [v.value for record in records for v in record.values if v.metric == metric]


def test_seeds_become_one_row_with_mean_and_interval() -> None:
    records = [cell(seed) for seed in range(3)]
    row = merged(*records)
    assert row.label == "gptq 4 bits g128 (3 seeds)"
    found = figures(records, "perplexity")
    value, spread = row.values["perplexity", PERPLEXITY], row.spreads["perplexity", PERPLEXITY]
    assert value.value == pytest.approx(statistics.mean(found))
    assert spread.deviation == pytest.approx(statistics.stdev(found))
    expected = stats.spread(found)
    assert expected is not None
    assert spread.interval == expected[1:]
    assert [one.label for one in row.cells] == [
        f"gptq 4 bits g128 (seed={seed})" for seed in range(3)
    ]


def test_each_sample_is_its_mean_over_repetitions() -> None:
    records = [cell(0), cell(1)]
    value = merged(*records).values["perplexity", PERPLEXITY]
    samples = [next(v for v in r.values if v.metric == "perplexity").samples for r in records]
    assert value.samples == tuple((a + b) / 2 for a, b in zip(*samples, strict=True))
    short = changed(records[1], "perplexity", samples=samples[1][:-1])
    assert merged(records[0], short).values["perplexity", PERPLEXITY].samples == ()


def test_what_differs_in_more_than_the_seed_stays_apart() -> None:
    other = cell(1)
    method = {**other.config["resolved"]["method"], "symmetric": True}
    resolved = {**other.config["resolved"], "method": method}
    rows = make_rows([cell(0), replace(other, config={**other.config, "resolved": resolved})])
    assert len(rows) == 2
    assert rows[0].label.startswith("gptq 4 bits g128 (")
    assert len(make_rows([cell(0), cell(1, bits=3)])) == 2


def test_equal_cells_of_two_versions_are_no_repetitions() -> None:
    again = replace(cell(0), cell="again")
    assert len(make_rows([cell(0), again, cell(1)])) == 3


def test_the_configuration_says_what_repetitions_are() -> None:
    def of_mode(record: Record, mode: str) -> Record:
        resolved = {**record.config["resolved"], "repeat": mode}
        return replace(record, config={**record.config, "resolved": resolved})

    records = [cell(0), cell(1)]
    rows = make_rows([of_mode(record, "none") for record in records])
    assert [row.label for row in rows] == [f"gptq 4 bits g128 (seed={seed})" for seed in range(2)]
    assert len(make_rows(records, "none")) == 2
    assert len(make_rows([of_mode(record, "none") for record in records], "seed")) == 1
    old = []
    for record in records:
        resolved = {k: v for k, v in record.config["resolved"].items() if k != "repeat"}
        old.append(replace(record, config={**record.config, "resolved": resolved}))
    assert len(make_rows(old)) == 1


def test_calibration_texts_are_repetitions_where_asked_for() -> None:
    records = [
        repetition(Synthetic(seed=i).cell("gptq", 4, 128, "packed", "k"), 0, text=text)
        for i, text in enumerate(("c4", "wikipedia", "code"))
    ]
    assert len(make_rows(records)) == 3
    row = merged(*records, repeat="calibration")
    assert row.label == "gptq 4 bits g128 (3 calibration texts)"
    assert [one.label for one in row.cells] == [
        f"gptq 4 bits g128 (calibration={text})" for text in ("c4", "code", "wikipedia")
    ]
    both = merged(*records, cell(1), repeat="calibration")
    assert both.label == "gptq 4 bits g128 (4 calibrations)"


def test_baselines_merge_too_and_carry_the_comparison() -> None:
    same = [repetition(baseline(), seed) for seed in range(3)]
    (group,) = make_groups(make_rows([*same, *(cell(seed) for seed in range(3))]))
    first, row = group.rows
    assert first.is_baseline
    assert first.label == "fp32 (3 seeds)"
    found = judge(group).get(row, "perplexity", PERPLEXITY)
    assert found is not None
    assert found.baseline is first
    assert found.verdict == "worse"
    column = next(c for c in summary_table(group).columns if c.metric == "perplexity")
    assert column.cells[0].repeats == "all equal"
    assert column.cells[1].repeats.startswith("± ")


def test_means_of_answers_are_compared_without_flips() -> None:
    records = [with_tasks(cell(seed), 0.9 - 0.1 * seed) for seed in range(2)]
    (group,) = make_groups(make_rows([with_tasks(baseline()), *records]))
    (found,) = judge(group).of("acc_norm", "hellaswag_0shot")
    assert found.comparison.lost is None
    assert found.comparison.test == "paired bootstrap"
    assert set(found.row.values["acc_norm", "hellaswag_0shot"].samples) <= {0.0, 0.5, 1.0}


def test_failed_seeds_are_named_and_stay_out_of_the_mean() -> None:
    records = [cell(0), cell(1), failed(cell(2))]
    rows = make_rows(records)
    assert [row.label for row in rows if row.measured] == ["gptq 4 bits g128 (2 seeds)"]
    assert len([row for row in rows if not row.measured]) == 1
    row = merged(cell(0), partial(cell(1)))
    assert row.status == "partial"
    assert row.errors[0].stage == "tasks"
    assert row.spreads["acc", "endings_0shot_limit100"].count == 1


def test_figures_that_are_not_finite_have_no_interval() -> None:
    records = [cell(0), changed(cell(1), "perplexity", value=math.inf)]
    row = merged(*records)
    assert row.values["perplexity", PERPLEXITY].value == math.inf
    assert row.spreads["perplexity", PERPLEXITY].interval is None
    (group,) = make_groups([row])
    column = detail_table(group, {"perplexity"}).columns[0]
    assert column.cells[0].repeats == "not finite"


def test_files_have_one_row_a_merged_row_and_every_single_value() -> None:
    records = [cell(seed) for seed in range(3)]
    rows = make_rows([baseline(), *records])
    columns, found = table.results(rows)
    assert {"repetitions", "cells"} <= set(columns)
    assert [entry["repetitions"] for entry in found] == [1, 3]
    assert found[1]["cells"].count("seed") == 3
    single = table.values(rows)
    assert len(single) == sum(len(record.values) for record in [baseline(), *records])
    assert {entry["cell"] for entry in single} == {baseline().cell, *(r.cell for r in records)}


def test_the_page_lists_every_cells_command_and_failure() -> None:
    records = [baseline(), cell(0), partial(cell(1)), cell(2)]
    page = make_page(records)
    text = markdown(page)
    for seed in range(3):
        assert f"seed={seed}`" in text
    assert text.count("- gptq 4 bits g128 (seed=1) (embedded on cpu), partial") == 1
    assert "3 seeds" in text
    assert "s their standard deviation" in text
    assert "no flips are counted" in text
    assert ("Cells", "4 (3 ok, 1 partial)") in page.facts
