"""Signals that ask a run to stop: Ctrl-C once and twice, SIGTERM, SIGHUP, with two launchers.

Ctrl-C is sent as a terminal does: to every process of the driver's group at once.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.faults.sweep import LIGHT, POLL_SECONDS, Done, Sweep, cheap
from tests.faults.tally import Tally

START_SECONDS = 1.5
"""In which joblib's workers import what they need, and start their fork servers."""
CELLS_A_STOP = 4
"""More than a run finishes before it is stopped, or it would end by itself."""
SENTENCE = "interrupted; finished cells are kept, the same command goes on with the rest"
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


@dataclass(frozen=True)
class Stop:
    """One way of stopping a run.

    Attributes:
        name: what is said of it.
        numbers: the signals, in turn.
        pause: seconds between two of them.
        grouped: sent to the driver's whole group, as a terminal does.
        launcher: overrides that choose one.
        early: sent while its workers start; else once a cell was finished.
    """

    name: str
    numbers: tuple[signal.Signals, ...]
    pause: float = 0.0
    grouped: bool = False
    launcher: tuple[str, ...] = ()
    early: bool = False


STOPS = (
    Stop("Ctrl-C once", (signal.SIGINT,), grouped=True),
    Stop("Ctrl-C twice", (signal.SIGINT,) * 2, 0.05, grouped=True),
    Stop("SIGTERM", (signal.SIGTERM,)),
    Stop("SIGHUP", (signal.SIGHUP,)),
    Stop("Ctrl-C once, two workers", (signal.SIGINT,), grouped=True, launcher=JOBLIB),
    Stop("SIGTERM, two workers", (signal.SIGTERM,), launcher=JOBLIB),
    Stop("kill -9, two workers", (signal.SIGKILL,), launcher=JOBLIB),
    Stop(
        "Ctrl-C once, workers that start",
        (signal.SIGINT,),
        grouped=True,
        launcher=JOBLIB,
        early=True,
    ),
    Stop("kill -9, workers that start", (signal.SIGKILL,), launcher=JOBLIB, early=True),
)


def stop(folder: Path, count: int, seed: int) -> Tally:
    """Stop `count` runs in each way, each once it has finished a cell; then run to the end."""
    tally = Tally("Ctrl-C once and twice, SIGTERM, SIGHUP; two workers (joblib)")
    chance = random.Random(seed)
    cells = cheap(CELLS_A_STOP * count * len(STOPS))
    sweep = Sweep(folder, cells, {"PYTHONPATH": LIGHT})
    for way in STOPS * count:
        before = sweep.finished()
        sweep.arguments = [*cells, *way.launcher]
        with sweep.running() as driver:
            if way.early:
                _wait_for_workers(sweep, driver)
                time.sleep(chance.uniform(0, START_SECONDS))
            else:
                while len(sweep.finished()) == len(before) and driver.poll() is None:
                    time.sleep(0.02)
                time.sleep(chance.uniform(0, 0.2))
            _send(driver, way)
            done = sweep.ended(driver)
            tally.faults += 1
            tally.check_after_fault(sweep, before)
        tally.sentences += _unclear(done, way)
    before = sweep.finished()
    sweep.arguments = cells
    done = sweep.run()
    tally.check_records(sweep, before)
    tally.check_second_run(sweep, done)
    sweep.remove()
    return tally


def _wait_for_workers(sweep: Sweep, driver: subprocess.Popen[bytes]) -> None:
    while driver.poll() is None and not sweep.of_role("other"):
        time.sleep(POLL_SECONDS)


def _send(driver: subprocess.Popen[bytes], way: Stop) -> None:
    for number in way.numbers:
        with suppress(ProcessLookupError):
            if way.grouped:
                os.killpg(driver.pid, number)
            else:
                driver.send_signal(number)
        time.sleep(way.pause)


def _unclear(done: Done, way: Stop) -> list[str]:
    """Return what is wrong with how a stopped run ended: status, sentence, no trace."""
    number = way.numbers[0]
    codes = (128 + number, -number)
    # The second signal of two does not wait for the sentence.
    said = SENTENCE in done.err or len(way.numbers) > 1 or number == signal.SIGKILL
    if done.code in codes and said and "Traceback" not in done.err:
        return []
    return [f"{way.name}: status {done.code}, said {done.err[-1500:]!r}"]
