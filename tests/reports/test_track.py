"""`python -m reports track`: what wandb is told of each row, read back from its own files."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.lm_eval_results import FILE_NAME, write_results
from harness.record import Failure, Record, Value, write_record
from reports import track
from reports.__main__ import main
from reports.gather import make_rows
from reports.track import make_runs
from tests.harness.test_lm_eval_results import KEPT, RECORD
from tests.reports.synthetic import PERPLEXITY, Synthetic

ROOT = Path(__file__).resolve().parents[2]
SECRET = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 32768

Writer = Callable[[list[Record]], Path]


def rows_of(records: list[Record]) -> dict[str, track.Run]:
    return {run.config["cell"]: run for run in make_runs(make_rows(records, "none"), "p")}


def test_a_run_holds_axes_and_values_with_their_protocols() -> None:
    cell = Synthetic().cell("rtn", 4, 32, "packed", "rtn int4")
    (run,) = rows_of([cell]).values()
    assert run.name == "rtn 4 bits g32"
    assert (run.group, run.job_type, run.failed) == ("embedded on cpu", "smoke", False)
    axes = {key: run.config[key] for key in ("method", "bits", "group_size", "method.symmetric")}
    assert axes == {"method": "rtn", "bits": 4, "group_size": 32, "method.symmetric": False}
    found = {value.metric: value for value in cell.values if value.protocol == PERPLEXITY}
    assert run.summary[f"perplexity/{PERPLEXITY}"] == found["perplexity"].value
    assert run.summary[f"perplexity_stderr/{PERPLEXITY}"] == found["perplexity"].stderr
    names = {f"{value.metric}/{value.protocol}" for value in cell.values}
    assert names == {name for name in run.summary if "_stderr/" not in name}
    assert run.tags == ("embedded", "rtn", "cpu", "ok")


def test_runs_keep_their_ids_and_repetitions_are_runs_of_their_own() -> None:
    cell = Synthetic().cell("rtn", 4, 32, "packed", "rtn int4")
    resolved = {"method": {"name": "rtn"}, "seed": 1}
    other = replace(cell, cell="other", config={**cell.config, "resolved": resolved})
    found = rows_of([cell, other])
    assert found[cell.cell].id == rows_of([replace(cell, seconds=1.0)])[cell.cell].id
    assert found[cell.cell].id != found["other"].id
    assert found["other"].config["seed"] == 1
    (elsewhere,) = make_runs(make_rows([cell]), "another project")
    assert elsewhere.id != found[cell.cell].id


def test_a_simulated_row_has_no_speed_there_either() -> None:
    cell = Synthetic().cell("rtn", 4, 32, "simulated", "rounded")
    (run,) = rows_of([cell]).values()
    assert f"perplexity/{PERPLEXITY}" in run.summary
    kept_back = ("per_second", "artefact_bytes", "peak_memory")
    assert any(value.metric.startswith(kept_back[1]) for value in cell.values)
    assert not [name for name in run.summary if any(part in name for part in kept_back)]


def test_mistakes_are_one_sentence(
    runs: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    cell = Synthetic().cell("fp32", 32, None, "packed", "torch.linear")
    folder = runs([cell])
    assert main(["track", str(folder), "--project", "p"]) == 2
    assert "needs the package wandb" in capsys.readouterr().err
    monkeypatch.setattr(track, "find_spec", lambda name: "is there")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["track", str(folder), "--project", "p"]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["track", str(tmp_path / "absent"), "--project", "p"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    search = replace(cell, config={**cell.config, "job": "sensitivity"})
    assert main(["track", str(runs([search])), "--project", "p"]) == 2
    assert "has no record of a cell" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["track", str(folder)])
    assert "--project" in capsys.readouterr().err


def logged(path: Path) -> Iterator[Any]:
    """The records of wandb's file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield WandbRecord.FromString(whole)
            whole = b""


def read_back(folder: Path) -> dict[str, dict[str, Any]]:
    """Cell -> what the files of its run say."""
    found = {}
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        said: dict[str, Any] = {"summary": {}}
        for record in logged(path):
            if record.HasField("run"):
                said["run"] = record.run
                items = record.run.config.update
                said["config"] = {one.key: json.loads(one.value_json) for one in items}
            for one in record.summary.update:
                said["summary"][one.key] = json.loads(one.value_json) if one.key else None
            if record.HasField("exit"):
                said["exit"] = record.exit.exit_code
        assert said["config"]["cell"] not in found, "a cell has one run"
        found[said["config"]["cell"]] = said
    return found


def command(folder: Path, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a login of its own, and a server that cannot be reached."""
    places = {f"WANDB_{name}_DIR": str(home) for name in ("CACHE", "CONFIG", "DATA")}
    login = {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "-m", "reports", "track", str(folder), "--project", "p", *options],
        cwd=ROOT,
        env={**os.environ, **places, **login, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_real_library_writes_each_row_once(runs: Writer, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (the extra `tracking`)")
    whole = Synthetic().cell("fp32", 32, None, "packed", "torch.linear")
    infinite = Value("perplexity", "perplexity", "a.b/c", math.inf, "perplexity", False)
    broken = replace(
        Synthetic().cell("rtn", 2, 32, "packed", "rtn int2"),
        status="failed",
        values=(infinite,),
        errors=(Failure("speed", "signal", "killed"),),
    )
    folder = runs([whole, broken])
    home = tmp_path / "home"
    home.mkdir()
    done = command(folder, home)
    assert done.stderr == ""
    assert done.returncode == 0
    assert "2 cells: 2 written, 0 there already" in done.stdout
    assert "nothing was sent" in done.stdout
    found = read_back(folder)
    (run,) = rows_of([whole]).values()
    said = found[whole.cell]
    assert (said["run"].run_id, said["run"].project) == (run.id, "p")
    assert said["run"].display_name == "fp32"
    assert list(said["run"].tags) == ["embedded", "fp32", "cpu", "ok"]
    assert {key: said["config"][key] for key in run.config} == run.config
    assert {key: said["summary"][key] for key in run.summary} == run.summary
    assert (said["exit"], found[broken.cell]["exit"]) == (0, 1)
    assert found[broken.cell]["summary"]["perplexity/a.b/c"] in ("Infinity", math.inf)
    files = [path for path in (*folder.rglob("*"), *home.rglob("*")) if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]

    again = command(folder, home)
    assert "2 cells: 0 written, 2 there already" in again.stdout
    write_record(replace(whole, seconds=1.0), folder / "cell000")
    changed = command(folder, home)
    assert "2 cells: 1 written, 1 there already" in changed.stdout
    assert read_back(folder)[whole.cell]["config"]["seconds"] == 1.0


def test_lm_evals_own_logger_takes_the_results_of_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (the extra `tracking`)")
    from lm_eval.loggers import WandbLogger

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_results(RECORD, KEPT, tmp_path)
    try:
        logger = WandbLogger({"project": "p", "dir": str(tmp_path), "mode": "offline"})
        logger.post_init(json.loads((tmp_path / FILE_NAME).read_text()))
        logger.log_eval_result()
        logger.run.finish()
    finally:
        wandb.teardown()
    assert logger.wandb_results["sums/exact_match,strict-match"] == 0.25
    assert logger.wandb_results["pages/perplexity"] is None
