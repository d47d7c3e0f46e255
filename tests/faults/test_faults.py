"""The short form of every series: no fault loses a finished cell or leaves anything behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.series import SERIES, UNABLE


@pytest.mark.parametrize("name", SERIES)
def test_a_fault_costs_nothing_that_was_finished(tmp_path: Path, name: str) -> None:
    try:
        tally = SERIES[name][0](tmp_path / "faults")
    except UNABLE as error:
        pytest.skip(str(error))
    assert tally.sentences == []
    assert tally.faults > 0
    assert tally.second == tally.completed > 0
