"""How cells are handed out: kinds of hardware, queues of a cluster, side by side on one machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig

from harness import identity, kinds
from harness.cell import Cell
from harness.kinds import for_elsewhere, kinds_of
from harness.planning import plan_cell
from harness.record import read_records
from hydra_plugins import quantbench_slurm
from hydra_plugins.quantbench import GridSweeper, Queue, wait_for
from hydra_plugins.quantbench_slurm import SlurmLauncher
from kernels.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = {
    *("partition", "account", "qos", "gres", "gpus_per_node", "mem_gb", "cpus_per_task"),
    *("timeout_min", "constraint", "exclude", "exclusive", "array_parallelism", "array_size"),
    *("setup", "additional_parameters", "submitit_folder"),
}


def cell(name: str, hardware: str = "cpu", **options: Any) -> tuple[Cell, list[str]]:
    device = "cuda" if "gpu" in hardware else "cpu"
    config = {"hardware": {"name": hardware, "device": device, "machine": None, **options}}
    return cast(Cell, SimpleNamespace(title=name, config=config)), [f"method={name}"]


def on_gpu(name: str, **options: Any) -> tuple[Cell, list[str]]:
    return cell(name, "gpu", machine="EPYC + A100", launch={"slurm": {"gres": "gpu:1", **options}})


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_launcher_has_the_options_that_its_file_documents() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(
            "config",
            overrides=["hydra/launcher=slurm", "hydra.launcher.gres=gpu:1"],
            return_hydra_config=True,
        )
        launcher = config.hydra.launcher
        assert set(launcher) >= DOCUMENTED
        assert launcher.gres == "gpu:1"
        raw = cast(DictConfig, launcher)._get_node("submitit_folder")
        assert str(raw).startswith("${hydra.sweep.dir}/")


def test_cells_that_ask_the_launcher_for_the_same_are_one_launch() -> None:
    cells = [cell("fp32"), on_gpu("fp32"), cell("rtn"), on_gpu("rtn"), on_gpu("gptq", mem_gb=80)]
    # The last one asks for more under the same name of hardware.
    found = kinds_of(cells, "slurm", {"gres", "mem_gb"})
    assert [(kind.options, [one.title for one, _ in kind.cells]) for kind in found] == [
        ({}, ["fp32", "rtn"]),
        ({"gres": "gpu:1"}, ["fp32", "rtn"]),
        ({"gres": "gpu:1", "mem_gb": 80}, ["gptq"]),
    ]


def test_what_hardware_asks_of_one_launcher_is_not_for_another() -> None:
    (kind,) = kinds_of([cell("fp32"), on_gpu("fp32")], "basic", set())
    assert kind.options == {}


def test_an_option_that_the_launcher_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpu has launch\.slurm\.gres, .*; it has partition$"):
        kinds_of([on_gpu("fp32")], "slurm", {"partition"})


def test_one_name_for_two_machines_is_refused() -> None:
    cells = [cell("fp32", machine="EPYC"), cell("fp32", machine="Xeon")]
    with pytest.raises(
        ConfigError, match="hardware cpu stands for several machines, EPYC and Xeon"
    ):
        kinds_of(cells, "slurm", set())


def test_a_cell_says_on_which_machine_it_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    name = 'Odd\'s "CPU" (R) @ 2.5GHz, {a: 1}'
    monkeypatch.setattr(kinds, "machine_name", lambda device: name)
    monkeypatch.setattr(kinds, "has_card", lambda: False)
    (_, plain), (_, named) = for_elsewhere([cell("fp32"), on_gpu("rtn")])
    assert named == ["method=rtn"], "what the user said stands"
    override = OverridesParser.create().parse_override(plain[-1])
    assert (override.key_or_group, override.value()) == ("hardware.machine", name)
    with pytest.raises(ConfigError, match="give processor and card of that machine as hardware"):
        for_elsewhere([cell("fp32", "gpu")])


class FakeQueue:
    """Jobs are numbers; each ends as `results` says, the last first."""

    def __init__(self, results: Sequence[Any] = (), refuses: bool = False) -> None:
        self.results, self.refuses = list(results), refuses
        self.submitted: list[tuple[int, list[list[str]]]] = []
        self.cancelled: list[Any] = []

    def submit(self, points: Sequence[Sequence[str]], first: int) -> list[Any]:
        if self.refuses:
            raise ConfigError("no such partition")
        self.submitted.append((first, [list(point) for point in points]))
        return list(range(first, first + len(points)))

    def ended(self, jobs: Sequence[Any]) -> Iterator[tuple[int, JobReturn]]:
        for place in reversed(range(len(jobs))):
            result = self.results[place]
            failed = isinstance(result, Exception)
            status = JobStatus.FAILED if failed else JobStatus.COMPLETED
            yield place, JobReturn(status=status, _return_value=result)

    def notice(self, jobs: Sequence[Any]) -> str:
        return f"{len(jobs)} jobs"

    def cancel(self, jobs: Sequence[Any]) -> None:
        self.cancelled += jobs


def test_a_queue_gets_all_kinds_at_once_and_each_end_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    died = RuntimeError("its job 7_2 ended without a result (CANCELLED)")
    first, second = FakeQueue(["ok", "elsewhere", died, "ok"]), FakeQueue()
    assert isinstance(first, Queue)
    cells = [cell("fp32"), cell("rtn"), on_gpu("fp32"), on_gpu("awq")]
    left = wait_for([(first, cells[:2]), (second, cells[2:])])
    assert left == [cells[1]]
    assert first.submitted == [(0, [["method=fp32"], ["method=rtn"]])]
    assert second.submitted == [(2, [["method=fp32"], ["method=awq"]])]
    lines = [line.partition(", about")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "4 jobs",
        "[1/4] awq: ok",
        "[2/4] fp32: failed: its job 7_2 ended without a result (CANCELLED)",
        "[3/4] rtn: elsewhere",
        "[4/4] fp32: ok",
    ]


def test_a_queue_is_left_empty_where_one_kind_is_refused() -> None:
    first, second = FakeQueue(), FakeQueue(refuses=True)
    with pytest.raises(ConfigError, match="no such partition"):
        wait_for([(first, [cell("fp32")]), (second, [on_gpu("fp32")])])
    assert first.cancelled == [0]


@pytest.mark.parametrize(
    ("hidden", "sentence"),
    [
        ("find_spec", "pip install hydra-submitit-launcher"),
        ("which", "needs Slurm's sbatch, which is not here"),
    ],
)
def test_what_slurm_needs_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hidden: str, sentence: str
) -> None:
    monkeypatch.setattr(quantbench_slurm, "find_spec", lambda name: name)
    owner = quantbench_slurm if hidden == "find_spec" else shutil
    monkeypatch.setattr(owner, hidden, lambda name: None)
    with pytest.raises(SystemExit) as ended:
        SlurmLauncher().setup(
            hydra_context=cast(HydraContext, None),
            task_function=lambda config: None,
            config=DictConfig({}),
        )
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: hydra/launcher=slurm needs")
    assert sentence in line


def test_no_cells_at_once_are_refused() -> None:
    done = run("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0", "method=rtn", "bits=4")
    assert done.returncode == 2
    assert done.stderr == (
        "error: hydra.launcher.n_jobs is 0; it must be 1 or more, or -1 for as many cells at once "
        "as there are processors\n"
    )


def test_cells_run_side_by_side(tmp_path: Path) -> None:
    done = run(
        "-m", "model=gpt2", "suite=size_only", "method=fp16,rtn", "bits=8,4,3", "group_size=128",
        "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"runs_dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": ok (") == 4
    records, problems = read_records(tmp_path)
    assert problems == []
    assert [record.status for record in records] == ["ok"] * 4


def test_a_cell_fails_on_another_machine_than_it_names(tmp_path: Path) -> None:
    named = "hardware.machine=EPYC of another rack"
    done = run("-m", "model=gpt2", "suite=size_only", "method=fp16", named, f"runs_dir={tmp_path}")
    assert done.returncode == 1
    ((record,), _) = read_records(tmp_path)
    (failure,) = record.errors
    assert failure.kind == "machine"
    assert failure.message.startswith("the cell was planned for the machine 'EPYC of another rack'")


def test_a_machine_that_is_named_makes_the_key_that_it_makes_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(identity, "machine_name", lambda device: "EPYC")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        keys = [
            plan_cell(compose("config", overrides=["suite=smoke", *overrides]), overrides).key
            for overrides in ([], ["hardware.machine=EPYC"], ["hardware.machine=Xeon"])
        ]
    assert keys[0] == keys[1] != keys[2]


def test_how_a_cell_is_handed_out_is_no_part_of_its_key() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        keys = {
            plan_cell(compose("config", overrides=overrides), overrides).key
            for overrides in ([], ["+hardware.launch.slurm.gres=gpu:1"])
        }
    assert len(keys) == 1


def test_a_launcher_whose_process_was_killed_keeps_what_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(points: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise BrokenProcessPool

    sweeper = GridSweeper(None)
    monkeypatch.setattr(sweeper, "_kinds", lambda cells: kinds_of(cells, "joblib", set()))
    monkeypatch.setattr(sweeper, "_launcher", lambda options: SimpleNamespace(launch=launch))
    monkeypatch.setattr(sweeper, "_turns", lambda cells: [cells])
    assert sweeper._run([cell("fp32")]) == []
    assert "finished cells are kept" in capsys.readouterr().err
