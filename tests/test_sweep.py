"""Sweeps by name: several grids, each with axes that the command line replaces or leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from harness.record import read_records
from hydra_plugins.quantbench import points, usable, without
from kernels.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
SWEEPS = [path.stem for path in sorted((CONF / "sweep").glob("*.yaml"))]
RESERVED = {"fixed", "needs"}

GRIDS: dict[str, Any] = {
    "sizes": {
        "fixed": {"suite": "size_only", "model": "gpt2,llama-7b"},
        "method": "rtn,fp16",
        "bits": "4,2",
    },
    "measured": {"method": "rtn", "bits": 8},
    "always": {"seed": "1,2"},
}
"""Fixed axes, a grid of the same method without them, and one that names no method."""

OWN = """# @package _global_
sweep:
  sizes:
    fixed: {suite: size_only, model: gpt2}
    method: fp16,rtn
    bits: 4
  absent:
    needs: no_such_module
    method: hqq
hydra:
  mode: MULTIRUN
"""


def of(grids: dict[str, Any], *arguments: str) -> list[set[str]]:
    return [set(point) for point in points(usable(OmegaConf.create(grids)), arguments, None)]


def sweep(name: str) -> Any:
    return OmegaConf.load(CONF / "sweep" / f"{name}.yaml")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_each_grid_is_the_product_of_its_own_axes() -> None:
    found = of(GRIDS)
    assert len(found) == 2 * 2 * 2 + 1 + 2
    assert {"suite=size_only", "model=gpt2", "method=fp16", "bits=2"} in found
    assert {"method=rtn", "bits=8"} in found
    assert {"seed=2"} in found


def test_the_command_line_replaces_axes_but_not_those_that_are_fixed() -> None:
    found = of(GRIDS, "model=local", "model.path=here", "data.source=local", "bits=3", "suite=full")
    given = {"model=local", "model.path=here", "data.source=local", "bits=3", "suite=full"}
    assert {"method=rtn", *given} in found
    assert {"seed=1", *given} in found
    kept = {"suite=size_only", "model=gpt2", "method=rtn", "bits=3", "data.source=local"}
    assert kept in found
    assert len(found) == 2 * 2 + 1 + 2


def test_methods_choose_among_grids_with_fixed_axes_too() -> None:
    found = of({key: GRIDS[key] for key in ("sizes", "measured")}, "method=fp16,awq")
    assert [point for point in found if "method=fp16" in point] == [
        {"suite=size_only", f"model={model}", "method=fp16", f"bits={bits}"}
        for model in ("gpt2", "llama-7b")
        for bits in (4, 2)
    ]
    # Named by no grid: what was given, alone.
    assert {"method=awq"} in found
    assert len(found) == 5


def test_a_name_that_only_begins_like_a_fixed_one_is_not_fixed() -> None:
    grids = {"one": {"fixed": {"method": "rtn", "model": "gpt2"}}}
    assert of(
        grids, "models=3", "model.config.n_layer=2", "+model.x=1", "model@model=llama-7b"
    ) == [{"method=rtn", "model=gpt2", "models=3"}]


def test_a_grid_without_its_library_is_left_out_with_a_note(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = of(
        {
            "here": {"needs": "json", "method": "rtn"},
            "absent": {"needs": "json, no_such_module", "method": "hqq"},
        }
    )
    assert found == [{"method=rtn"}]
    assert capsys.readouterr().out == (
        "note: grid absent is left out: no_such_module is not installed here\n"
    )


@pytest.mark.parametrize("grid", ["rtn", ["method=rtn"], {"fixed": "model"}])
def test_a_grid_that_is_no_mapping_is_refused(grid: Any) -> None:
    with pytest.raises(ConfigError, match="grid odd must have Hydra overrides by key"):
        of({"odd": grid})


@pytest.mark.parametrize("grid", [{"bits": [4, 3]}, {"fixed": {"bits": [4, 3]}, "method": "rtn"}])
def test_an_axis_that_is_a_list_is_refused_with_how_it_is_written(grid: Any) -> None:
    with pytest.raises(ConfigError, match=r"grid odd has bits: \[4, 3\]; .* as bits: VALUE,VALUE"):
        of({"odd": grid})


def test_a_sweep_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match="a mapping of grids by name"):
        usable(OmegaConf.create([{"method": "rtn"}]))  # type: ignore[arg-type]


def test_what_describes_the_sweep_is_no_part_of_a_cell() -> None:
    own = ["+sweep=documents", "sweep.rtn.bits=4", "~sweep.gguf", "+sweep@sweep=documents"]
    assert without([*own, "sweeps=1", "method.sweep=1"], "sweep") == ["sweeps=1", "method.sweep=1"]


def test_several_values_for_the_sweep_itself_are_refused() -> None:
    quoted = 'sweep.rtn.bits="4,3"'
    assert without([quoted], "sweep") == []
    with pytest.raises(ConfigError, match=r"two pairs of quotes: 'sweep\.rtn\.bits=\"4,3\"'"):
        without(["sweep.rtn.bits=4,3"], "sweep")


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_names_choices_that_there_are(name: str) -> None:
    first = (CONF / "sweep" / f"{name}.yaml").read_text().splitlines()[:2]
    assert first[0] == "# @package _global_"
    assert first[1].startswith("# "), "the first line says what the sweep is"
    for grid in sweep(name).sweep.values():
        axes = {**grid.get("fixed", {}), **{k: v for k, v in grid.items() if k not in RESERVED}}
        for key, values in axes.items():
            group = CONF / key.partition("@")[0]
            if group.is_dir():
                choices = {path.stem for path in group.glob("*.yaml")}
                assert set(str(values).split(",")) <= choices, (key, values)


def test_the_documents_points_compose_with_what_their_grid_says() -> None:
    grids = sweep("documents").sweep
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name, grid in grids.items():
            (first, *_) = points(usable(OmegaConf.create({name: grid})), [], None) or [[]]
            config = compose("config", overrides=first)
            sized = "size_only" in str(grid.get("fixed"))
            assert config.suite.name == ("size_only" if sized else "bench")
            assert (config.model.name == "embedded") is not sized
            assert "sweep" not in config


def test_sweeping_by_name_runs_its_own_grids_and_no_default_ones(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(OWN)
    runs = tmp_path / "runs"
    # Without -m, and with an axis that the fixed model does not hear of.
    done = run("--config-dir", str(tmp_path), "+sweep=mine", "model=embedded", f"runs_dir={runs}")
    assert done.returncode == 0, done.stderr
    assert "note: grid absent is left out: no_such_module is not installed here" in done.stdout
    assert "2 cells, 0 of them there already" in done.stdout
    records, problems = read_records(runs)
    assert problems == []
    assert {(r.config["model"], r.config["method"], r.config["suite"]) for r in records} == {
        ("gpt2", "fp16", "size_only"),
        ("gpt2", "rtn", "size_only"),
    }
    for record in records:
        assert "+sweep" not in record.config["command"]
        assert "sweep" not in record.config["resolved"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["+sweep=nope"], "Could not find 'sweep/nope'"),
        (["+sweep=documents", "+search=documents"], "+sweep and +search"),
        (["+sweep=documents", "sweep.odd=3"], "sweep.odd"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    done = run(*arguments, f"runs_dir={tmp_path / 'runs'}")
    assert done.returncode not in (0, None)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
