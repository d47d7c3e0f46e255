"""Comparisons as files, and of any two rows on the command line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from harness.record import Record
from reports.__main__ import main
from reports.comparisons import comparisons, comparisons_csv, comparisons_parquet
from reports.gather import make_groups, make_rows
from reports.verdicts import judge
from tests.reports.synthetic import PERPLEXITY, Synthetic, with_tasks

Write = Callable[[list[Record]], Path]


def test_one_row_a_cell_and_figure_with_its_statistics(grid: list[Record]) -> None:
    groups = make_groups(make_rows(grid))
    found = comparisons(groups)
    assert len(found) == len(judge(groups[0]).found)
    keys = [(entry["cell"], entry["metric"], entry["protocol"]) for entry in found]
    assert len(set(keys)) == len(keys)
    (one,) = [
        entry
        for entry in found
        if entry["cell"] == "embedded-rtn-2-32-cpu" and entry["metric"] == "perplexity"
    ]
    assert one["protocol"] == PERPLEXITY
    assert one["baseline"] == grid[0].cell
    assert one["n"] == 16
    assert one["value"] > one["baseline_value"]
    assert one["low"] < one["difference"] < one["high"]
    assert one["p_holm"] >= one["p"]
    assert (one["verdict"], one["acceptance"]) == ("worse", "unacceptable")
    assert one["lost"] is None
    flips = next(entry for entry in found if entry["metric"] == "acc")
    assert flips["lost"] + flips["gained"] >= 0


def test_csv_and_parquet_hold_the_same(grid: list[Record]) -> None:
    groups = make_groups(make_rows(grid))
    table = pq.read_table(io.BytesIO(comparisons_parquet(groups))).to_pylist()
    lines = list(csv.DictReader(io.StringIO(comparisons_csv(groups).decode())))
    assert list(table[0]) == list(lines[0])
    assert len(table) == len(lines)
    for entry, line in zip(table, lines, strict=True):
        for name, value in entry.items():
            if isinstance(value, bool):
                assert line[name] == str(value).lower()
            elif isinstance(value, float):
                assert float(line[name]) == value
            else:
                assert line[name] == ("" if value is None else str(value))


def test_nothing_to_compare_is_a_table_without_rows() -> None:
    groups = make_groups(make_rows([Record(cell="c", status="ok", config={})]))
    assert pq.read_table(io.BytesIO(comparisons_parquet(groups))).num_rows == 0
    assert comparisons_csv(groups).decode().startswith("cell,model,hardware,label,baseline")


def test_a_divergence_differs_in_the_file_as_on_the_page(grid: list[Record]) -> None:
    perfect = [
        replace(one, value=0.0, samples=(0.0,) * len(one.samples))
        if one.metric == "kl_mean"
        else one
        for one in grid[0].values
    ]
    found = comparisons(make_groups(make_rows([replace(grid[0], values=perfect), *grid[1:]])))
    verdicts = {entry["verdict"] for entry in found if entry["metric"] == "kl_mean"}
    assert "differs" in verdicts
    assert "worse" not in verdicts


def test_any_two_rows_are_compared_on_every_shared_figure(
    runs: Write, grid: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs([with_tasks(grid[0]), with_tasks(grid[5]), with_tasks(grid[7], 0.5)])
    assert main([str(folder), "--compare", "rtn 4 bits g32", "rtn 8 bits g32"]) == 0
    said = capsys.readouterr()
    assert "A: rtn 4 bits g32" in said.out
    assert "B: rtn 8 bits g32" in said.out
    for wanted in (PERPLEXITY, "hellaswag_0shot", "worse", "unacceptable", "16 windows", "Holm"):
        assert wanted in said.out
    assert max(len(line) for line in said.out.splitlines()) <= 160
    assert not (folder / "report").exists()


def test_an_unknown_row_is_one_sentence_that_names_close_ones(
    runs: Write, grid: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs(grid)
    assert main([str(folder), "--compare", "rtn 4 bits g32", "rtn 8 bit g32"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: no measured row is called 'rtn 8 bit g32'; close ones are:")
    assert "'rtn 8 bits g32'" in said.err
    assert said.err.count("\n") == 1


def test_rows_of_two_groups_are_not_compared(
    runs: Write, grid: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    other = Synthetic("other").cell("nf4", 4, 64, "packed", "k")
    assert main([str(runs([*grid, other])), "--compare", "fp16", "nf4 4 bits g64"]) == 1
    assert "are in no group together" in capsys.readouterr().err


def test_rows_without_shared_samples_say_so(
    runs: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = [
        Record(cell=name, status="ok", config={"model": "m", "method": name, "hardware": "cpu"})
        for name in ("a", "b")
    ]
    assert main([str(runs(bare)), "--compare", "a", "b"]) == 0
    assert "They share no figure that stands on the same samples" in capsys.readouterr().out
