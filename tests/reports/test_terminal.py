from __future__ import annotations

from dataclasses import replace

import pytest

from harness.record import Record
from reports.table import summary_text
from tests.reports.synthetic import PERPLEXITY, SPEED, Synthetic, changed


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("width", [120, 100, 80])
def test_no_line_is_wider_than_asked(sweep: list[Record], width: int) -> None:
    text = summary_text(sweep, ["cell9/record.json is damaged " + "x" * 200], width=width)
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_baseline_stands_first_and_columns_are_aligned(grid: list[Record]) -> None:
    lines = summary_text(grid, width=120).splitlines()
    assert lines[0] == "embedded on cpu; baseline fp32"
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    assert lines[rule + 1].startswith("fp32")
    rows = lines[rule + 1 : rule + 14]
    head = lines[1]
    end = head.index("perplexity") + len("perplexity")
    assert all(row[end - 1].isdigit() for row in rows)


def test_best_ratio_protocol_and_legend_are_there(grid: list[Record]) -> None:
    text = summary_text(grid, width=120)
    (row,) = lines_of(text, "rtn 2 bits g128")
    assert "3.23* x0.27" in row
    assert "6.100 " in lines_of(text, "fp32")[0]
    assert "2,479! x406" in row
    assert lines_of(text, "noisy timing") == ["noisy timing: int8_static"]
    assert f"perplexity, KL: {PERPLEXITY}" in text
    assert SPEED in text
    assert "* best of the column; ~ equivalent within 3 %; ! worse, tested against the" in text


def test_failed_partial_and_unreadable_cells_are_named_with_their_reason(
    sweep: list[Record],
) -> None:
    text = summary_text(sweep, ["cell9/record.json is damaged"], width=120)
    joined = " ".join(text.split())
    assert "FAILED rtn 3 bits g32 (embedded on cpu): quantize: the quantize process was" in joined
    assert "PARTIAL rtn 3 bits g128 (embedded on cpu): tasks: the tasks had <no> answers" in joined
    assert "UNREADABLE cell9/record.json is damaged" in joined
    assert not lines_of(text, "rtn 3 bits g32 ")
    assert "n/m: not measured" in joined


def test_random_weights_are_said_and_have_no_quality_columns(sweep: list[Record]) -> None:
    text = summary_text([r for r in sweep if r.config["model"] == "shape-0.5b"], width=120)
    assert "random weights: no quality figures" in text
    assert "perplexity" not in text


def test_a_row_beside_its_baseline_alone(grid: list[Record]) -> None:
    text = summary_text([grid[0], grid[8]], width=120)
    assert lines_of(text, "fp32")
    assert lines_of(text, "rtn 4 bits g128")


def test_a_group_of_failures_and_a_missing_baseline(sweep: list[Record]) -> None:
    only_failed = [record for record in sweep if record.status == "failed"]
    text = summary_text(only_failed, width=120)
    assert "baseline not measured" in text
    assert "no cell of this group was measured" in text


def test_control_characters_and_foreign_letters_do_not_reach_the_terminal() -> None:
    record = Synthetic("evil\x1b[31m\nmodel").cell("fp32", 32, None, "packed", "k")
    text = summary_text([record], width=120)
    assert "\x1b" not in text
    assert text.isprintable() or all(line.isprintable() for line in text.splitlines())


def test_without_colour_or_unicode(sweep: list[Record]) -> None:
    assert summary_text(sweep, width=120).isascii()


def test_an_infinite_perplexity_is_written(grid: list[Record]) -> None:
    broken = changed(grid[12], "perplexity", value=float("inf"))
    assert "infinite" in summary_text([grid[0], broken], width=120)


def test_a_long_label_is_cut(grid: list[Record]) -> None:
    record = replace(grid[3], config={**grid[3].config, "method": "m" * 90})
    assert "mmm..." in summary_text([grid[0], record], width=120)


def test_a_long_label_keeps_what_tells_its_row_apart(grid: list[Record]) -> None:
    node = {"name": "int8_static", "observer": "percentile", "calibration": {"samples": 512}}
    rows = []
    for observer, samples in (("percentile", 512), ("min_max", 128)):
        options = {**node, "observer": observer, "calibration": {"samples": samples}}
        config = {**grid[3].config, "method": "int8_static", "bits": 8, "group_size": -1}
        config["resolved"] = {"method": options}
        rows.append(replace(grid[3], cell=f"int8-{observer}", config=config))
    text = summary_text([grid[0], *rows], width=140)
    assert "int8_static ... (samples=512, observer=percentile)" in text
    assert "int8_static ... (samples=128, observer=min_max)" in text
