"""The tables and commands of the cost of a sweep; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from tests.peers.sweep_cost import (
    GRIDS,
    ROOT,
    ROWS,
    Asked,
    CostError,
    Timings,
    lm_eval_command,
    main,
    script_command,
    sweep_command,
    write_task,
)
from tests.peers.sweep_cost_table import (
    BEGIN,
    COUNTS,
    END,
    agrees,
    between_marks,
    straight_line,
    tables,
)


def asked_of(folder: Path, **changes: Any) -> Asked:
    values = {
        "model": folder / "model",
        "data": folder / "data",
        "out": folder / "out",
        "methods": ("fp32", "nf4"),
        "counts": (4, 8),
        "rounds": 2,
        "windows": 3,
        "questions": 50,
        "threads": 2,
        "jobs": 2,
        "batch_sizes": (8, 32),
    }
    return Asked(**{**values, **changes})


def timings() -> dict[str, Any]:
    """What a run leaves: T(n) = 10 + 5 n, nf4 one question and a hair of perplexity apart."""
    load = {"load_before": 0.25, "load_after": 1.5}
    figures = {
        "fp32": {"perplexity": 80.0, "kl_mean": 0.0, "acc": 0.3, "acc_norm": 0.32},
        "nf4": {"perplexity": 81.0, "kl_mean": 0.0104, "acc": 0.28, "acc_norm": 0.3},
    }
    steps: dict[str, Any] = {"reference": {"seconds": 8.0}, "batch-8": {"seconds": 21.0}}
    for n in (4, 8):
        cells = {f"cell{index}": {"measuring": 4.0} for index in range(n)}
        steps[f"sweep-{n}"] = {"seconds": 10.0 + 5 * n, "figures": cells, **load}
    for turn in range(2):
        for jobs, seconds in ((1, 20.0), (2, 15.0)):
            found = {"seconds": seconds + turn, "by_method": figures, **load}
            steps[f"ours-{jobs}-{turn}"] = found
        for method, seconds in (("fp32", 20.0), ("nf4", 22.0)):
            mine = figures[method]
            found = {"seconds": seconds + turn, "acc": mine["acc"], "acc_norm": 0.32, **load}
            steps[f"lm_eval-{method}-{turn}"] = found
            found = {"seconds": 9.0, "perplexity": mine["perplexity"] + 1e-3}
            steps[f"script-{method}-{turn}"] = {**found, "kl": mine["kl_mean"]}
    machine = {"processor": "A processor", "python": "3.11", "versions": {"torch": "2.13"}}
    settings = {"model": "m", "methods": ["fp32", "nf4"], "windows": 3, "questions": 50}
    return {"settings": {**settings, "threads": 2, "jobs": 2}, "steps": steps, "machine": machine}


def test_the_tables_say_what_was_timed() -> None:
    written = tables(timings())
    # (20.5 + 9 + 22.5 + 9) / 2 = 30.5 s a method by the medians.
    assert "| 4 | 30 | 7.5 | 4.0 | 122 | 4.1 | 0.2–1.5 |" in written
    assert "| 8 | 50 | 6.2 | 4.0 | 244 | 4.9 | 0.2–1.5 |" in written
    assert "2 cells side by side. A straight line through them is 10.0 s + 5.00 s" in written
    assert "the farthest T(n) is 0% from it" in written
    assert "| lm_eval, nf4 | 22.5 (22.0) |" in written
    # 61 s and 8 s for the logits; the least are 60 s.
    assert "| **one by one** | 69.0 (68.0) |" in written
    assert "one cell at a time** | 20.5 (20.0) | **3.37** (3.40) |" in written
    assert "2 cells side by side** | 15.5 (15.0) | **4.45** (4.53) |" in written
    same = "| nf4 | 81.0000 / 81.0010 | 0.0104 / 0.0104 | 0.280 / 0.280 | 0.300 / 0.320 | yes |"
    assert same in written


def test_what_is_not_done_yet_is_left_out() -> None:
    data = timings()
    data["steps"] = {name: step for name, step in data["steps"].items() if "sweep" in name}
    written = tables(data)
    assert "| 8 | 50 | 6.2 | 4.0 | 0.2–1.5 |" in written
    assert "one by one" not in written


def test_other_work_does_not_count_as_the_same() -> None:
    mine = {"perplexity": 80.0, "acc": 0.3, "acc_norm": 0.3}
    assert agrees(mine, {"perplexity": 80.004}, {"acc": 0.304, "acc_norm": 0.3}, 500)
    assert not agrees(mine, {"perplexity": 80.004}, {"acc": 0.306, "acc_norm": 0.3}, 500)
    assert not agrees(mine, {"perplexity": 80.02}, {"acc": 0.3, "acc_norm": 0.3}, 500)


def test_a_page_keeps_its_prose() -> None:
    page = f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n"
    assert between_marks(page, "new") == f"# Title\n\n{BEGIN}\n\nnew\n\n{END}\n\nThe end.\n"
    with pytest.raises(ValueError, match="must have the lines"):
        between_marks("# Title\n", "new")
    own = (ROOT / "benchmarks" / "cost" / "README.md").read_text()
    assert "new" in between_marks(own, "new")


def test_a_straight_line_is_found() -> None:
    assert straight_line({4: 30.0, 8: 50.0, 16: 90.0}) == pytest.approx((10.0, 5.0))


@pytest.mark.parametrize("count", COUNTS)
def test_a_sweep_has_as_many_points_as_it_says(tmp_path: Path, count: int) -> None:
    axes = ("method=rtn,hqq", *GRIDS[count])
    points = 1
    for axis in axes:
        points *= len(axis.partition("=")[2].split(","))
    assert points == count
    command = sweep_command(asked_of(tmp_path), tmp_path / "runs", 1, *axes)
    overrides = [one.partition(",")[0] for one in command[command.index("-m") + 1 :]]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides)
    measures = config.suite.measures
    assert list(measures) == ["divergence", "perplexity", "tasks"]
    assert measures.perplexity.windows == measures.divergence.windows == 3
    assert (measures.tasks.limit, list(measures.tasks.tasks)) == (50, ["hellaswag"])
    assert (config.hardware.threads, config.runs_dir) == (2, str(tmp_path / "runs"))


def test_cells_side_by_side_share_the_threads(tmp_path: Path) -> None:
    command = sweep_command(asked_of(tmp_path), tmp_path / "runs", 2, "method=rtn")
    assert {"hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hardware.threads=1"} <= {*command}


def test_the_other_side_reads_the_same(tmp_path: Path) -> None:
    asked = asked_of(tmp_path)
    artefact = tmp_path / "artefact"
    command = lm_eval_command(asked, artefact, 32, tmp_path / "into")
    assert f"pretrained={artefact},dtype=float32" in command
    assert command[command.index("--limit") + 1] == "50"
    assert command[command.index("--batch_size") + 1] == "32"
    script = script_command(asked, artefact, "--reference")
    assert script[script.index("--windows") + 1] == "3"
    assert str(asked.data / ROWS["text"]) in script


def test_lm_evals_own_definition_is_read_with_the_rows_of_a_file(tmp_path: Path) -> None:
    asked = asked_of(tmp_path)
    write_task(asked)
    task = yaml.safe_load((asked.out / "tasks" / "hellaswag_local.yaml").read_text())
    assert task["task"] in lm_eval_command(asked, tmp_path, 8, tmp_path)
    assert task["dataset_kwargs"]["data_files"] == {
        "validation": str(asked.data / ROWS["questions"])
    }
    assert "task: hellaswag\n" in Path(task["include"]).read_text()


def test_finished_timings_are_kept_and_others_refused(tmp_path: Path) -> None:
    asked = asked_of(tmp_path)
    asked.out.mkdir()
    done: list[str] = []

    def work() -> dict[str, Any]:
        done.append("once")
        return {"seconds": 1.0}

    Timings(asked).step("sweep-4", work)
    assert Timings(asked).step("sweep-4", work)["seconds"] == 1.0
    assert done == ["once"]
    assert json.loads((asked.out / "timings.json").read_text())["steps"]["sweep-4"]["seconds"] == 1
    with pytest.raises(CostError, match="take another folder with --out"):
        Timings(asked_of(tmp_path, windows=4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "there is no"),
        (("--counts", "5"), "--counts has 5; it may have 4, 8, 16, 32"),
        (("--jobs", "0"), "--jobs is 0; it must be 1 or more"),
        (("--methods", "nf4"), "it must begin with fp32"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    if options:
        for path in (model / "config.json", *(data / rows for rows in ROWS.values())):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    folders = ("--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"))
    assert main([*folders, *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
