"""What the bench writes: what follows from rows, targets beside what was reached, tables."""

from __future__ import annotations

from typing import Any

import pytest

from kernels import bench, bench_core, bench_report, bench_targets
from kernels.bench_core import SCHEMES
from kernels.bench_report import Row, derive, reached, refusals, result_tables, target_lines
from kernels.bench_targets import Target


def row(contender: str, role: bench_core.Role, bits: int, seconds: float, **more: Any) -> Row:
    facts = {"shape": "s", "out_features": 8, "in_features": 16, "tokens": 1, **more}
    nbytes = more.pop("nbytes", 100)
    facts.pop("nbytes", None)
    return Row(
        bits=bits,
        group_size=-1,
        contender=contender,
        role=role,
        nbytes=nbytes,
        median=seconds,
        samples=(seconds,),
        how="calls",
        **facts,
    )


ROWS = [
    row("linear", "baseline", 16, 8.0),
    row("mine", "ours", 4, 2.0),
    row("slow", "peer", 4, 5.0),
    row("fast", "peer", 4, 1.0),
    row("other bits", "peer", 8, 0.5),
    row("mine", "ours", 4, 4.0, tokens=16),
    Row("s", 8, 16, 0, 3, -1, "mine", "ours", refusal="no packed kernel"),
]


def test_what_follows_from_the_rows() -> None:
    found = {(d.row.contender, d.row.tokens): d for d in derive(ROWS, 200.0)}
    mine = found["mine", 1]
    assert (mine.share, mine.faster, mine.ahead) == (0.25, 4.0, 0.5)
    assert (mine.row.bandwidth, mine.row.operations) == (50.0, 128.0)
    assert found["linear", 1].ahead is None
    alone = found["mine", 16]
    assert (alone.faster, alone.ahead) == (None, None)
    assert len(found) == 6


def test_targets_show_the_worst() -> None:
    derived = derive([*ROWS, row("mine", "ours", 4, 4.0, shape="t", nbytes=40_000_000)], 200.0)
    bandwidth = Target("of the copy", 0.2, "share", "w4", (1, 128))
    assert reached(bandwidth, derived) == [0.25, 0.125, 50_000.0]
    large = Target("large", 0.2, "share", "w4", megabytes=(40, 50))
    behind = Target("of slow", 1.0, "ahead", "w4", peer="slow")
    none = Target("none", 1.0, "faster", "w4 zeros")
    lines = target_lines([bandwidth, large, behind, none], derived)
    assert [line.met for line in lines] == ["no", "yes", "yes", ""]
    text = bench_targets.table(lines)
    assert "| of the copy | 0.20 | 0.12 | 3 | no |" in text
    assert "| large | 0.20 | 50000.00 | 1 | yes |" in text
    assert "| of slow | 1.00 | 2.50 | 1 | yes |" in text
    assert "| none | 1.00 | not measured | 0 |  |" in text
    elsewhere = Target("elsewhere", 1.0, "faster", None, (1, 128), shapes=((9, 9),))
    assert reached(elsewhere, derived) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_targets_name_what_is_measured(device: str) -> None:
    schemes = {scheme.name for scheme in SCHEMES}
    names = {contender.name for contender in bench.CONTENDERS[device]}
    for target in bench_targets.SINGLE[device]:
        assert target.scheme is None or target.scheme in schemes
        assert target.peer is None or target.peer in names
        assert set(target.shapes) <= set(bench.SHAPES.values())
        assert any(target.tokens[0] <= m <= target.tokens[1] for m in bench.TOKENS)


def test_the_tables_have_every_row() -> None:
    text = result_tables(derive(ROWS, 200.0))
    assert text.startswith("## s: 8 x 16\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6
    assert {line.count("|") for line in lines} == {len(bench_report.COLUMNS) + 1}
    assert refusals(ROWS) == "- mine, w3: no packed kernel (s)\n"
