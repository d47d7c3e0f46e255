"""Children do their work, and every way of dying becomes one sentence."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import launch
from harness.launch import Outcome, run_child
from harness.memory import MemoryGroup

MEBIBYTE = 2**20
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Limits:
    memory_limit_bytes: int | None = None
    time_limit_seconds: float = 60.0
    environment: Mapping[str, str] = field(default_factory=dict)
    usable_threads: int = 1


def run(name: str, folder: Path, limits: Limits | None = None, **job: Any) -> Outcome:
    stages: list[str] = []
    target = f"tests.harness.children:{name}"
    return run_child(target, job, folder, limits or Limits(), stages.append)


def message(outcome: Outcome) -> str:
    assert outcome.failure is not None
    return outcome.failure.message


def test_a_child_works_with_its_environment_and_threads(tmp_path: Path) -> None:
    limits = Limits(environment={"QUANTBENCH_TEST": "yes"})
    outcome = run("fine", tmp_path, limits, file=str(tmp_path / "out"))
    assert outcome.ok
    assert (tmp_path / "out").read_text() == "yes 1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["children.log", "out"]


def test_a_mistake_of_the_user_is_its_sentence_alone(tmp_path: Path) -> None:
    outcome = run("config_error", tmp_path)
    assert outcome.exit_code == launch.EXIT_CONFIG
    assert message(outcome) == "bits is 5; it must be 8, 4, 3 or 2"


def test_an_exception_is_named_and_the_log_has_the_trace(tmp_path: Path) -> None:
    outcome = run("error", tmp_path)
    assert message(outcome) == "RuntimeError: something broke"
    assert "Traceback" in (tmp_path / "children.log").read_text()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_a_signal_ends_the_child_only(tmp_path: Path, name: str) -> None:
    outcome = run("killed", tmp_path, signal=name)
    assert outcome.failure is not None
    assert outcome.failure.kind == name
    assert f"killed by {name}; its last words: about to die" in message(outcome)
    assert run("fine", tmp_path, file=str(tmp_path / "out")).ok


def test_an_exit_without_a_word_is_seen(tmp_path: Path) -> None:
    outcome = run("leaves", tmp_path)
    assert "ended with exit code 7; its last words: goodbye" in message(outcome)


def test_a_hanging_child_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    # The clock of the limit includes the start of the fork server, which the first test paid.
    assert run("fine", tmp_path, file=str(tmp_path / "out")).ok
    outcome = run("hangs", tmp_path, Limits(time_limit_seconds=3), file=str(tmp_path / "pid"))
    assert "longer than hardware.time_limit_seconds=3" in message(outcome)
    grandchild = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not psutil.pid_exists(grandchild):
            break
        time.sleep(0.05)
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == "zombie"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_killed_takes_its_children_with_it(
    tmp_path: Path, how: signal.Signals
) -> None:
    file = tmp_path / "pid"
    program = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.harness.test_launch import run\n"
        "run('hangs', pathlib.Path(sys.argv[2]), file=sys.argv[3])\n"
    )
    command = [sys.executable, "-c", program, str(ROOT), str(tmp_path), str(file)]
    driver = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 120
        while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        grandchild = psutil.Process(int(file.read_text()))
        begun = [*grandchild.parents()[:2], grandchild]
        assert driver.pid not in [process.pid for process in begun]
    finally:
        driver.send_signal(how)
        driver.wait()
    # The child, the fork server that it came from, and what the child had started.
    gone, alive = psutil.wait_procs(begun, timeout=30)
    left = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"{left} outlived the driver; gone are {gone}"


def test_memory_is_measured_beyond_what_the_child_inherits(tmp_path: Path) -> None:
    assert run("allocates", tmp_path, mebibytes=100, file=str(tmp_path / "out")).ok
    assert 100 * MEBIBYTE <= int((tmp_path / "out").read_text()) < 160 * MEBIBYTE


@pytest.mark.parametrize("group", [True, False], ids=["control group", "watchdog"])
def test_the_memory_limit_is_enforced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: bool
) -> None:
    if not group:
        monkeypatch.setattr(MemoryGroup, "create", classmethod(lambda cls, limit: None))
    else:
        made = MemoryGroup.create(MEBIBYTE)
        if made is None:
            pytest.skip("this system lets us make no control group with a memory limit")
        made.remove()
    limits = Limits(memory_limit_bytes=150 * MEBIBYTE)
    outcome = run("allocates", tmp_path, limits, mebibytes=1500, file=str(tmp_path / "out"))
    assert message(outcome) == (
        "the children process was stopped: it needed more memory than its limit of 150 MiB"
    )
    assert not (tmp_path / "out").exists()
    assert run("allocates", tmp_path, limits, mebibytes=50, file=str(tmp_path / "out")).ok
