"""A report of a thousand rows: all of them there once, and a page that a browser can bear."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from harness.record import Record
from reports.page import MOST_DETAILED, Page, make_page
from reports.render import BEYOND_LEGEND, drawings, html, markdown
from tests.reports.synthetic import Synthetic

ROWS = 1000
MOST_BYTES = 2_500_000
SUMMARY_LINE = r"\| [^|]* \(seed=\d+\) \| (packed|dequantized)<br>"


def many(rows: int) -> list[Record]:
    """Return cells of one group that differ in their seed and stand apart."""
    grid = Synthetic("simulated").grid()
    made = [grid[0]]
    for number in range(rows - 1):
        record = grid[5 + number % 8]
        resolved = {**record.config["resolved"], "seed": number, "repeat": "none"}
        config = {**record.config, "resolved": resolved}
        made.append(replace(record, cell=f"{record.cell}-{number}", config=config))
    return made


@pytest.fixture(scope="module")
def page() -> Page:
    return make_page(many(ROWS))


def test_every_row_stands_in_the_page_once(page: Page) -> None:
    text = html(page, drawings(page))
    anchors = Counter(re.findall(r'<tr id="(row-\d+)"', text))
    assert len(anchors) == ROWS
    assert set(anchors.values()) == {1}
    links = Counter(re.findall(r'<a class="label" href="(cells/[^"]+)"', text))
    assert len(links) == ROWS
    assert set(links.values()) == {1}
    assert BEYOND_LEGEND in text
    assert len(text) < MOST_BYTES
    lines = [line for line in markdown(page).splitlines() if re.match(SUMMARY_LINE, line)]
    assert len(lines) == ROWS - 1


def test_a_group_of_few_rows_has_all_its_tables() -> None:
    (few,) = make_page(many(13)).sections
    assert few.detailed
    assert {detail.title for detail in few.details} >= {"Tasks", "Quality", "Speed"}
    assert all(len(found.lines) > 0 for found in few.evidence)
    (more,) = make_page(many(MOST_DETAILED + 1)).sections
    assert not more.detailed
    assert not more.details
    titles = [found.title for found in few.evidence]
    assert [(found.title, found.lines) for found in more.evidence] == [(t, ()) for t in titles]
