"""Synthetic sweeps as fixtures, and a folder to write them into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.record import Record, write_record
from tests.reports.synthetic import Synthetic, awkward_sweep


@pytest.fixture
def grid() -> list[Record]:
    """The 13 cells of the default grid."""
    return Synthetic().grid()


@pytest.fixture
def sweep() -> list[Record]:
    """Every kind of cell."""
    return awkward_sweep()


@pytest.fixture
def runs(tmp_path: Path) -> Callable[[list[Record]], Path]:
    """Write records as a sweep leaves them and return its folder."""

    def write(records: list[Record]) -> Path:
        folder = tmp_path / "runs"
        for index, record in enumerate(records):
            write_record(record, folder / f"cell{index:03d}")
        return folder

    return write
