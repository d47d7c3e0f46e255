"""Runs a command and follows the memory of its process alone, without its children."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
POLL_SECONDS = 0.2
ENDED = re.compile(r"^\[ *(\d+)/(\d+)\] .*: (ok|partial|failed)\b")
"""The line that `run.py` prints behind a cell."""


@dataclass(frozen=True)
class Sample:
    """Memory of one process.

    Attributes:
        cell: cells that had ended.
        seconds: since the start.
        rss, uss: resident bytes, and those that no other process shares.
    """

    cell: int
    seconds: float
    rss: int
    uss: int


@dataclass
class Watched:
    """What was seen of a command.

    Attributes:
        status: its exit status.
        seconds: wall clock, start to end; `last_cell` is when the last cell had ended.
        cpu: processor seconds of the process alone.
        peak: most resident bytes of the process.
        ended: cells that ended, by how.
        samples: its memory after every so many cells.
        said: its last 200 lines.
    """

    status: int = 0
    seconds: float = 0.0
    last_cell: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def growth(self, first_cell: int) -> int | None:
        """Return bytes (unshared) that came on from `first_cell` to the last; None: too few."""
        later = [sample for sample in self.samples if sample.cell >= first_cell]
        return later[-1].uss - later[0].uss if len(later) > 1 else None


def watch(arguments: Sequence[str], every: int, environment: Mapping[str, str]) -> Watched:
    """Run this Python with `arguments`, memory looked at after each `every` cells."""
    start = time.monotonic()
    found = Watched()
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        seen = psutil.Process(process.pid)
        poll = threading.Thread(target=_poll, args=(seen, found), daemon=True)
        poll.start()
        assert process.stdout is not None
        cells = 0
        for line in process.stdout:
            found.said = [*found.said[-199:], line.rstrip()]
            if ended := ENDED.match(line):
                cells += 1
                found.ended[ended[3]] = found.ended.get(ended[3], 0) + 1
                found.last_cell = time.monotonic() - start
                if cells == 1 or cells % every == 0 or ended[1] == ended[2]:
                    memory = seen.memory_full_info()
                    found.samples.append(Sample(cells, found.last_cell, memory.rss, memory.uss))
        found.status = process.wait()
    poll.join()
    found.seconds = time.monotonic() - start
    return found


def _poll(process: psutil.Process, found: Watched) -> None:
    """Follow peak and processor time until the process has ended."""
    while True:
        try:
            times = process.cpu_times()
            found.cpu = times.user + times.system
            found.peak = max(found.peak, process.memory_info().rss)
        except psutil.Error:
            return
        if process.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(POLL_SECONDS)
