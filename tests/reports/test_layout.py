from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from harness.record import Record
from reports import layout
from reports.addresses import cell_page
from reports.drawing import axes, svg
from reports.gather import make_groups, make_rows
from reports.summary import Table, summary_table


@pytest.fixture
def table(grid: list[Record]) -> Table:
    (group,) = make_groups(make_rows(grid))
    return summary_table(group)


@pytest.mark.parametrize(
    ("value", "text", "factor", "exact", "written"),
    [
        (5_069_568.0, "5.07", 1e6, True, ' data-value="5.069568"'),
        (5_069_568.0, "5.07", 1e6, False, ""),
        (8.5, "8.50", 1.0, True, ""),
        (0.87, "87.0", 0.01, True, ""),
        (6859.0, "6,859", 1.0, True, ""),
        (0.0013, "+0.13 %", 1.0, True, ' data-value="0.0013"'),
        (0.00001, "< 0.0001", 1.0, False, ' data-value="1e-05"'),
        (math.inf, "infinite", 1.0, False, ' data-value="Infinity"'),
        (math.nan, "NaN", 1.0, False, ' data-value="NaN"'),
        (None, "not measured", 1.0, True, ""),
    ],
)
def test_a_field_carries_its_value_only_where_its_text_does_not(
    value: float | None, text: str, factor: float, exact: bool, written: str
) -> None:
    assert layout._sortable(value, text, factor, exact) == written


def test_only_long_names_may_break() -> None:
    assert layout._breakable("auto_round 4 bits g128") == "auto_round 4 bits g128"
    assert layout._breakable("quantized::linear_dynamic") == "quantized::<wbr>linear_<wbr>dynamic"
    assert layout._breakable("<b>") == "&lt;b&gt;"


def test_a_column_knows_its_unit_and_which_way_is_better(table: Table) -> None:
    columns = {column.metric: column for column in table.columns}
    assert axes.factor(columns["artefact_bytes"]) == 1e6
    assert axes.axis(table, columns["artefact_bytes"]) == axes.Axis("cost", "less", "at most")
    decode = columns["decode_tokens_per_second"]
    assert axes.axis(table, decode) == axes.Axis("cost", "more", "at least")
    assert axes.axis(table, columns["acc"]) == axes.Axis("quality", "more", "")
    assert axes.axis(table, columns["bits_per_weight"]) == axes.Axis("cost", "less", "")


def test_verdicts_are_told_once(table: Table) -> None:
    first, second = table.columns[:2]
    known = {(first.metric, first.protocol)}
    assert [judged for _, _, judged in axes.told([first, second], known)] == [False, True]
    assert [judged for _, _, judged in axes.told([first, second], None)] == [True, True]


def test_the_page_of_a_cell_has_a_safe_name_of_its_own() -> None:
    assert cell_page("embedded-rtn-4b-g128-cpu-0f1e") == "cells/embedded-rtn-4b-g128-cpu-0f1e.html"
    strange = ["a/b", "a-b", "a b", "../a", "", "<script>", "日本", "x" * 300, "x" * 301]
    names = [cell_page(cell) for cell in strange]
    assert len(set(names)) == len(strange)
    for name in names:
        folder, _, file = name.partition("/")
        assert folder == "cells"
        assert set(file) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert not file.startswith(".")
        assert len(file) < 200


DRAWING = """<?xml version="1.0"?>
<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="10pt" height="5pt" viewBox="0 0 10 5"
 xmlns="http://www.w3.org/2000/svg" version="1.1">
 <metadata>who made it</metadata>
 <defs><style type="text/css">*{stroke-linejoin: round}</style></defs>
 <g id="figure_1"><g id="points">
  <defs><path id="mark" d="M 0 1.23456
L 2.0 3 z"/></defs>
  <a xlink:href="#row-1"><g><use xlink:href="#mark" x="1.26" y="2" style="fill: #123456"/></g></a>
  <a xlink:href="#row-2"><g><use xlink:href="#mark" x="3" y="4" style="fill: #123456"/></g></a>
 </g><g id="words"><text style="font-size: 9px; font-family: 'Sans'; fill: #654321"
  transform="rotate(-0 1 2)">a &lt; b</text></g></g>
</svg>"""


def test_a_drawing_is_made_small_and_part_of_the_page() -> None:
    titles = {"row-1": "first <one>", "row-2": "second"}
    drawn = svg.for_page(DRAWING, titles, "p", {"ink": "#123456"})
    root = ET.fromstring(drawn)
    assert root.attrib == {"viewBox": "0 0 10 5"}
    assert 'd="M 0 1.2 L 2 3 z"' in drawn
    assert drawn.count('href="#p-1"') == 2
    assert 'id="p-1"' in drawn
    assert "figure_1" not in drawn
    assert drawn.count("fill:var(--ink)") == 1
    assert '<a href="#row-1"><title>first &lt;one&gt;</title><use' in drawn
    assert '<text style="font-size:9px;fill:#654321">a &lt; b</text>' in drawn
    assert "who made it" not in drawn
