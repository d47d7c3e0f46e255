"""A cell whose late owner finishes it at the last moment is not run again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from harness import cell as cell_module
from harness.cell import Cell, run_cell
from harness.planning import plan_cell
from harness.record import Record, write_record

CONF = Path(__file__).resolve().parents[2] / "conf"


def planned(folder: Path) -> Cell:
    given = [f"runs_dir={folder}", "suite=smoke"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plan_cell(compose("config", given), given)


def test_what_is_finished_while_it_is_taken_over_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = planned(tmp_path)

    def finish(folder: Path) -> None:
        # The late owner's rename came just before what it was writing would have been removed.
        write_record(Record(cell.id, "ok", cell.summary()), folder)

    def refuse(*_: object) -> str:
        raise AssertionError("the cell was run again")

    monkeypatch.setattr(cell_module, "remove_unfinished", finish)
    monkeypatch.setattr(cell_module, "_run_held", refuse)
    assert run_cell(cell, print) == "there"
