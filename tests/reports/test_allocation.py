from __future__ import annotations

import math
from dataclasses import replace

import pytest

from harness.record import Record
from reports.allocation import Uniform, allocation_blocks, lower_hull, validate
from reports.blocks import Map
from reports.gather import make_groups, make_rows
from reports.rows import Group, Row
from tests.reports.advanced import mixed, with_kl
from tests.reports.synthetic import Synthetic

SIZES = {(8, 128): (3.0e6, 0.001), (4, 128): (2.0e6, 0.1), (2, 128): (1.0e6, 100.0)}


def group_of(*records: Record) -> tuple[Group, Row]:
    """Return the group of a baseline, three uniform rows and `records`, and its mixed row."""
    grid = Synthetic().grid()
    uniform = []
    for record in grid:
        key = (record.config["bits"], record.config["group_size"])
        if record.config["method"] == "rtn" and key in SIZES:
            uniform.append(with_kl(record, *SIZES[key]))
    (group,) = make_groups(make_rows([grid[0], *uniform, *records]))
    (row,) = (row for row in group.rows if row.method == "mixed")
    return group, row


def test_the_curve_is_linear_in_bytes_for_the_logarithm_of_the_kl() -> None:
    found = validate(*group_of(mixed(2.5e6, 0.005)))
    assert found.expected == pytest.approx(0.01)
    assert found.ratio == pytest.approx(0.5)
    assert found.verdict == "better"
    assert found.why == "between rtn 4 bits g128 and rtn 8 bits g128"


@pytest.mark.parametrize(("kl", "verdict"), [(0.02, "worse"), (0.005, "better")])
def test_equal_patterns_of_windows_leave_no_doubt(kl: float, verdict: str) -> None:
    found = validate(*group_of(mixed(2.5e6, kl)))
    assert found.verdict == verdict
    assert found.interval == pytest.approx((kl / 0.01, kl / 0.01))


def test_windows_that_disagree_leave_it_open() -> None:
    noisy = with_kl(mixed(2.5e6, 0.0095), 2.5e6, 0.0095, spread=0.9)
    found = validate(*group_of(noisy))
    assert found.verdict == "not distinguishable"
    assert found.interval is not None
    assert found.interval[0] < 1 < found.interval[1]
    # By hand: the mix deviates by 0.9 and both neighbours by 0.05, in step.
    error = 0.85 * math.sqrt(8 / 7) / math.sqrt(8)
    assert math.log(found.interval[1] / found.interval[0]) == pytest.approx(2 * 1.96 * error)


@pytest.mark.parametrize(("size", "words"), [(0.5e6, "fewer bytes"), (3.5e6, "more bytes")])
def test_outside_the_curve_nothing_is_told(size: float, words: str) -> None:
    found = validate(*group_of(mixed(size, 0.02)))
    assert found.verdict == "cannot be told"
    assert words in found.why
    assert found.ratio is None


def test_without_uniform_rows_nothing_is_told() -> None:
    (group,) = make_groups(make_rows([Synthetic().grid()[0], mixed(2.5e6, 0.02)]))
    assert validate(group, group.rows[-1]).why == "fewer than two uniform rows stand beside it"


def test_the_hull_leaves_out_what_lies_above_it() -> None:
    rows = make_rows(Synthetic().grid())
    points = [(1.0, 1.0), (2.0, 0.9), (3.0, 0.01), (4.0, 0.02)]
    values = [rows[0].values["kl_mean", "embedded_gptq_1024"] for _ in points]
    found = lower_hull(
        [Uniform(rows[0], x, replace(v, value=y)) for (x, y), v in zip(points, values, strict=True)]
    )
    assert [point.size for point in found] == [1.0, 3.0]


def test_the_block_tells_budget_choices_and_the_verdict() -> None:
    group, row = group_of(mixed(2.5e6, 0.005))
    assert row.label == "mixed 5.2 bits on average"
    (block,) = allocation_blocks(group)
    assert "the mix is better" in block.sentences[0]
    (picture,) = block.pictures
    assert isinstance(picture, Map)
    assert {spot.text for spot in picture.spots.values()} == {"4.25", "8.25"}
    budget, choices, every = block.grids
    assert [f.text for f in budget.lines[0][1:4]] == ["average bits", "5.500 bits", "5.200 bits"]
    assert [f.text for f in choices.lines[0][1:]] == [
        "12 (75 % of weights)",
        "4 (25 % of weights)",
    ]
    assert len(every.lines) == 16


def test_no_allocation_is_no_block() -> None:
    (group,) = make_groups(make_rows(Synthetic().grid()))
    assert allocation_blocks(group) == []
