"""A sweep on a cluster of two nodes, one of which dies in the middle of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.owner import parse_owner
from harness.record import FILE_NAME, read_record, read_records
from tests.slurm.cluster import Cluster, ClusterError, running

ROOT = Path(__file__).resolve().parent.parent.parent
TIMED = ("loading", "speed", "paths", "memory", "generation")
"""Measures that wait until they have the processor alone, which both nodes share here."""
GRID = [
    *("method=rtn", "bits=8,4,3,2", "group_size=32,128,-1", "suite=smoke"),
    *(f"~suite.measures.{name}" for name in TIMED),
]
CELLS = 4 * 3
DYING = "n2"
HANG_SECONDS = 900


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("submitit", reason="hydra-submitit-launcher is not installed")
    try:
        with running(tmp_path_factory.mktemp("slurm"), cpus=2) as started:
            yield started
    except ClusterError as error:
        pytest.skip(f"no Slurm cluster here: {error}")


class Sweep:
    """A running sweep, its records watched."""

    def __init__(self, cluster: Cluster, runs: Path) -> None:
        self.cluster, self.runs = cluster, runs
        self.finished: dict[str, int] = {}
        """Cell -> when its record was written, as it was first seen."""
        command = ["run.py", "-m", "hydra/launcher=slurm", *GRID, f"runs_dir={runs}"]
        self.driver = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **cluster.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def look(self) -> None:
        """Note the cells that are done now."""
        for path in self.runs.glob(f"*/{FILE_NAME}"):
            name, written = path.parent.name, path.stat().st_mtime_ns
            # While a cell runs, its record holds what is measured so far.
            if name not in self.finished and read_record(path.parent).status == "ok":
                self.finished[name] = written

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not done():
            assert time.monotonic() < deadline, "the sweep hangs"
            self.look()
            time.sleep(0.05)

    def kill_in_the_middle(self, node: str) -> bool:
        """Kill `node` if it has begun a cell that is not done; say whether it was killed."""
        # Suspended meanwhile, or the cell could end between the look and the kill.
        with self.cluster.suspended(node) as processes:
            owners = {process.pid for process in processes}
            begun = [path.parent for path in self.runs.glob("*/claim.1") if _pid(path) in owners]
            self.look()
            if all(folder.name in self.finished for folder in begun):
                return False
            return bool(self.cluster.kill_node(node))


def _pid(claim: Path) -> int | None:
    owner = parse_owner(claim.read_text())
    return None if owner is None else owner.pid


def claims(runs: Path) -> dict[str, int]:
    """Cell -> how often somebody took it on."""
    return {
        path.parent.name: len(list(path.parent.glob("claim.*"))) for path in runs.glob("*/claim.1")
    }


def test_a_node_dies_and_every_cell_is_done_exactly_once(cluster: Cluster, tmp_path: Path) -> None:
    sweep = Sweep(cluster, tmp_path / "runs")
    try:
        sweep.until(lambda: len(sweep.finished) >= 4 and sweep.kill_in_the_middle(DYING))
        # The controller has not noticed yet.
        struck = cluster.jobs_on(DYING)
        sweep.until(cluster.hurry)
        sweep.until(lambda: sweep.driver.poll() is not None)
    finally:
        sweep.driver.kill()
        out, err = sweep.driver.communicate()
    assert sweep.driver.returncode == 0, out + err
    records, problems = read_records(sweep.runs)
    assert problems == []
    assert len(records) == CELLS
    assert {record.status for record in records} == {"ok"}
    # A job that died behind its record finds it there when Slurm runs it again.
    ends = re.findall(r"^\[ *\d+/12\] .+: (ok|there)\b", out, re.MULTILINE)
    assert len(ends) == CELLS, "each cell's end is said, once"
    assert ends.count("there") < len(struck)

    sweep.look()
    written = {
        path.parent.name: path.stat().st_mtime_ns for path in sweep.runs.glob(f"*/{FILE_NAME}")
    }
    assert written == sweep.finished, "a finished cell was run again"
    taken = claims(sweep.runs)
    assert len(taken) == CELLS
    again = [cell for cell, times in taken.items() if times > 1]
    assert 1 <= len(again) <= len(struck), "the jobs of the node are run again, no others"
    assert not list(sweep.runs.rglob("*.tmp")), "temporary files are left"
    assert f"report: {sweep.runs / 'report' / 'report.html'}" in out
