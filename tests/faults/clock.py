"""A clock of the wall that jumps by up to ten years, ten times a second, in every process of a run.

`clock.c` stands before the C library, so that all that reads the clock is told wrong; the machine's
own clock stays as it is. The kernel's, which dates files, is right: those are dated wrong by hand.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

from tests.faults.sweep import FAULTS, LIGHT, Sweep, cheap
from tests.faults.tally import Tally

CELLS = 6
TEN_YEARS = 10 * 365 * 24 * 3600


class NoCompilerError(Exception):
    """There is no C compiler here."""


def build(folder: Path) -> Path:
    """Compile `clock.c` into `folder`.

    Raises:
        NoCompilerError: there is nothing to compile it with.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise NoCompilerError("the wrong clock needs a C compiler (cc)")
    library = folder / "clock.so"
    source = FAULTS / "clock.c"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


def jump(folder: Path, count: int, seed: int) -> Tally:
    """Run `count` times under such a clock, kill each run but the last, and date files anew."""
    tally = Tally("a clock that jumps by years")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"PYTHONPATH": LIGHT, "LD_PRELOAD": str(build(folder))}
    chance = random.Random(seed)
    sweep = Sweep(folder / "sweep", cheap(CELLS), environment)
    for number in range(count):
        before = sweep.finished()
        with sweep.running() as driver:
            while number < count - 1 and driver.poll() is None and len(sweep.finished()) <= number:
                time.sleep(0.02)
            if number < count - 1:
                driver.kill()
            done = sweep.ended(driver)
        tally.faults += 1
        tally.check_after_fault(sweep, before)
        tally.sentences += _negative(sweep, done.out)
        _date_anew(sweep.runs, chance)
    tally.check_second_run(sweep, done)
    sweep.remove()
    return tally


def _negative(sweep: Sweep, out: str) -> list[str]:
    """Return a sentence for each duration below zero, in a record or on the screen."""
    found = [f"{r.cell} took {r.seconds} s" for r in sweep.records() if r.seconds < 0]
    return found + [line for line in out.splitlines() if "(-" in line or "about -" in line]


def _date_anew(runs: Path, chance: random.Random) -> None:
    """Date every file to somewhere within ten years; a released claim's date says that it is."""
    for path in runs.rglob("*"):
        if path.is_file() and path.stat().st_mtime_ns:
            moment = time.time() + chance.uniform(-TEN_YEARS, TEN_YEARS)
            os.utime(path, (moment, moment))
