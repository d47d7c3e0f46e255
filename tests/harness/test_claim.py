"""A claim is held by one, waited for by others, and let go by the dead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from harness.claim import claim


def _hold(path: Path, held: Any, release: Any) -> None:
    with claim(path, lambda holder: None):
        held.set()
        release.wait(30)


def _append(path: Path, log: Path) -> None:
    with claim(path, lambda holder: None):
        before = log.read_text() if log.exists() else ""
        time.sleep(0.01)
        log.write_text(before + "x")


def test_one_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    workers = [context.Process(target=_append, args=(tmp_path / "claim", log)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert log.read_text() == "x" * 6


def test_the_holder_is_named_and_a_killed_holder_lets_go(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "claim", held, release))
    holder.start()
    assert held.wait(30)
    seen: list[str] = []

    def waiting(name: str) -> None:
        seen.append(name)
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)

    with claim(tmp_path / "claim", waiting) as waited:
        assert waited
    holder.join()
    assert len(seen) == 1
    assert f"process {holder.pid} on " in seen[0]
    with claim(tmp_path / "claim", seen.append) as waited:
        assert not waited
