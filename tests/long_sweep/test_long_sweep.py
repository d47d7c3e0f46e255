"""A sweep of many cells: each once, and what the driver keeps does not grow with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from harness.identity import code_digest
from harness.known import Known
from harness.planning import plan_cell
from harness.record import read_records
from hydra_plugins.quantbench import TURN, GridSweeper
from kernels.errors import ConfigError
from tests.long_sweep.grid import Grid, arguments
from tests.long_sweep.watch import QUIET, ROOT, watch

POINTS = (["method=rtn", "bits=4"], ["method=rtn", "bits=8", "seed=1"], ["method=gptq", "bits=4"])


@dataclass
class Job:
    return_value: str


class Launcher:
    """Stands for one of Hydra's: remembers what it was given."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, int]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Job]:
        self.launched.append((initial_job_idx, len(job_overrides)))
        return [Job("ok") for _ in job_overrides]


def test_forty_cells_through_the_whole_path_run_once_each(tmp_path: Path) -> None:
    grid = Grid(models=1, seeds=1)
    grid.write_config(tmp_path / "conf")
    found = watch(["run.py", *arguments(tmp_path / "conf", tmp_path / "runs")], 10, QUIET)
    assert found.status == 0, found.said
    assert found.ended == {"ok": grid.cells}
    records, problems = read_records(tmp_path / "runs")
    assert not problems
    assert len({record.cell for record in records}) == grid.cells
    assert {record.config["model"] for record in records} == {"simulated_0"}
    assert (tmp_path / "runs/report/report.html").is_file()


@pytest.mark.parametrize(("launcher", "most"), [("basic", TURN), ("joblib", 10_000)])
def test_the_basic_launcher_gets_so_many_cells_at_a_time_that_the_driver_stays_small(
    launcher: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeper = GridSweeper(None)
    sweeper.config = OmegaConf.create(
        {"hydra": {"launcher": {}, "runtime": {"choices": {"hydra/launcher": launcher}}}}
    )
    fake = Launcher()
    monkeypatch.setattr(sweeper, "_launcher", lambda options: fake)
    monkeypatch.setattr(sweeper, "_kinds", lambda cells: [_Kind({}, cells)])
    cells: list[Any] = [(f"cell {number}", [f"seed={number}"]) for number in range(3 * TURN + 7)]
    assert sweeper._run(cells) == []
    assert sum(count for _, count in fake.launched) == len(cells)
    assert max(count for _, count in fake.launched) == min(most, len(cells))
    starts = [first for first, _ in fake.launched]
    assert starts == list(range(0, len(cells), most))


@dataclass
class _Kind:
    options: dict[str, Any]
    cells: list[Any]


def composed(overrides: Sequence[str], folder: Path) -> Any:
    return compose("config", [*overrides, "suite=smoke", f"runs_dir={folder}"])


def test_what_cells_share_is_found_and_held_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def count(*modules: str) -> str:
        asked.append(modules)
        return code_digest(*modules)

    monkeypatch.setattr("harness.identity.code_digest", count)
    known = Known()
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        apart = [plan_cell(composed(point, tmp_path), point) for point in POINTS]
        asked.clear()
        together = [plan_cell(composed(point, tmp_path), point, known) for point in POINTS]
    assert together == apart
    assert len(asked) == len(set(asked))
    first = together[0].config
    for name in ("suite", "hardware", "model", "data", "job"):
        assert all(cell.config[name] is first[name] for cell in together)
    assert len({cell.id for cell in together}) == len(POINTS)


def test_a_failed_look_up_is_not_remembered() -> None:
    known, tries = Known(), []

    def find() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise ConfigError("not there")
        return "there"

    with pytest.raises(ConfigError, match="not there"):
        known.once(("text",), find)
    assert known.once(("text",), find) == known.once(("text",), find) == "there"
    assert len(tries) == 2


def test_a_value_that_needs_more_than_a_name_is_resolved_as_omegaconf_does(tmp_path: Path) -> None:
    given = [
        "method=rtn",
        "++method.plain=${bits}",
        "++method.nested=[${bits},{a: ${data.source}}]",
    ]
    given += [
        "++method.text='bits ${bits}'",
        "++method.escaped='\\${bits}'",
        "data.calibration=c.txt",
    ]
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        config = composed(given, tmp_path)
        found = plan_cell(config, given).config
    assert found["method"] == OmegaConf.to_container(config.method, resolve=True)
    assert found["method"]["nested"] == [4, {"a": "embedded"}]
    assert found["data"] == OmegaConf.to_container(config.data.embedded, resolve=True)
    assert "hydra" not in found
