"""Plain lines where there is no terminal, with the time left."""

from __future__ import annotations

import io

import pytest

from harness.progress import CellProgress, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3599.6, "1 h 00 min"), (7512, "2 h 05 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_plain_lines_say_cell_stage_result_and_time_left() -> None:
    stream = io.StringIO()
    with CellProgress("embedded rtn 4 bits", 2, 10, 60.0, stream) as progress:
        progress.stage("quantizing")
        progress.finish("ok")
    assert stream.getvalue().splitlines() == [
        "[ 2/10] embedded rtn 4 bits: quantizing",
        "[ 2/10] embedded rtn 4 bits: ok (0 s), about 4 min 00 s left",
    ]


def test_the_last_cell_leaves_nothing() -> None:
    stream = io.StringIO()
    with CellProgress("cell", 3, 3, 10.0, stream) as progress:
        progress.finish("failed: no space")
    assert stream.getvalue() == "[3/3] cell: failed: no space (0 s)\n"
