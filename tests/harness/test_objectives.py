"""What a sweeper with objectives is told, and a study of real cells."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from harness.objectives import objective
from harness.record import Record, Value
from hydra_plugins.quantbench_optuna import PLUGIN
from kernels.errors import ConfigError
from tests.test_run import quantbench, records

needs_optuna = pytest.mark.skipif(
    find_spec(PLUGIN) is None, reason="hydra-optuna-sweeper is absent"
)
STUDY = [
    "-m",
    "hydra/sweeper=objectives",
    "hydra.sweeper.n_trials=4",
    "suite=size_only",
    "job.objectives=[computed_bytes,computed_bits_per_weight]",
]


def record(*values: tuple[str, str, float]) -> Record:
    made = tuple(Value("m", metric, protocol, v, "", None) for metric, protocol, v in values)
    return Record("cell", "ok", {}, made)


def test_a_metric_is_named_alone_or_with_its_protocol() -> None:
    found = record(("perplexity", "a", 3.0), ("perplexity", "b", 4.0), ("bytes", "stored", 5.0))
    assert objective(found, "bytes") == 5.0
    assert objective(found, "perplexity/b") == 4.0
    with pytest.raises(ConfigError, match="there are several: perplexity/a, perplexity/b"):
        objective(found, "perplexity")
    with pytest.raises(ConfigError, match="names 'speed', which cell does not have; it has bytes"):
        objective(found, "speed")


@needs_optuna
def test_a_study_keeps_its_cells_and_outlives_a_point_that_cannot_work(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    # 5 bits are refused: of four draws with this seed some are.
    done = quantbench(*STUDY, "method=rtn,fp16", "bits=8,5,4", f"runs_dir={runs}")
    assert "trial refused" in done.err
    assert "bits" in done.err
    assert "than which none is better in all objectives" in done.out
    assert done.code == 0, done.err
    cells = records(runs)
    assert cells
    assert {r.config["job"] for r in cells.values()} == {"cell"}
    before = {r.cell: r.started for r in cells.values()}
    again = quantbench(*STUDY, "method=rtn,fp16", "bits=8,5,4", f"runs_dir={runs}")
    assert again.code == 0, again.err
    assert {r.cell: r.started for r in records(runs).values()} == before


@needs_optuna
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["job.objectives=[]"], "needs figures to look for"),
        (["hydra.sweeper.direction=[minimize]"], "it must be one of minimize, maximize, or a list"),
        (["hydra.sweeper.n_trials=0"], "both must be 1 or more"),
        (["job.objectives=[perplexity]"], "job.objectives names 'perplexity', which embedded-"),
    ],
)
def test_what_cannot_be_studied_is_refused(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    done = quantbench(*STUDY, "bits=8,4", *arguments, f"runs_dir={tmp_path / 'runs'}")
    assert done.code == 2, done.out
    assert sentence in done.err
    assert "Traceback" not in done.err


def test_without_the_plugin_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from omegaconf import OmegaConf

    from hydra_plugins import quantbench_optuna

    monkeypatch.setattr(quantbench_optuna, "find_spec", lambda name: None)
    config = OmegaConf.create({"job": {"objectives": ["perplexity"]}})
    sampler = OmegaConf.create({})
    sweeper = quantbench_optuna.ObjectivesSweeper("minimize", 4, 1, None, None, sampler, sampler)
    with pytest.raises(SystemExit) as ended:
        sweeper.setup(hydra_context=None, task_function=None, config=config)  # type: ignore[arg-type]
    assert ended.value.code == 2
    assert "pip install hydra-optuna-sweeper" in capsys.readouterr().err
