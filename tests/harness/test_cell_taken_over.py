"""Who takes a cell over, and who only waited for it, leaves alone what another one writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from harness import cell as cell_module
from harness.cell import Cell, run_cell
from harness.claim import TakenOverError, still_held
from harness.lm_eval_results import FILE_NAME as RESULTS
from harness.lm_eval_results import write_results
from harness.owner import Owner
from harness.planning import plan_cell
from harness.record import Record, write_record
from harness.temporary import temporary_beside

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


def test_who_waited_until_another_had_finished_removes_nothing(
    tmp_path: Path,
) -> None:
    cell = planned(tmp_path)
    cell.folder.mkdir(parents=True)
    (cell.folder / "claim.1").write_text(f"{Owner('0' * 12, 7, 7).token} far-away\n")
    writing = temporary_beside(cell.folder / "samples.parquet")
    writing.touch()

    def finish(text: str) -> None:
        assert text == "waiting: process 7 on far-away runs this cell"
        write_record(Record(cell.id, "ok", cell.summary()), cell.folder)

    assert run_cell(cell, finish) == "there"
    assert writing.exists()


def test_who_was_overtaken_removes_no_results(tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text("the successor's")
    (tmp_path / "claim.2").touch()
    with pytest.raises(TakenOverError), still_held(tmp_path / "claim.1") as last_look:
        write_results(Record("c", "failed", {}), {}, tmp_path, last_look)
    assert (tmp_path / RESULTS).read_text() == "the successor's"
