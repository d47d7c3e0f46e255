"""kill -9 at random moments: of the driver, of its children, of the fork server they come from."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from harness.record import FILE_NAME
from tests.faults.sweep import LIGHT, POLL_SECONDS, REAL, Sweep, cheap, undisturbed
from tests.faults.tally import Tally

CELLS = 12
START_SHARE = 0.3
START_SECONDS = 4.0
"""A share of the drivers is killed somewhere in these seconds: while it plans, checks, starts."""
CELLS_AHEAD = 4
"""The others are killed in one of the next cells."""
LONGEST_STEP_SECONDS = 0.4


def kill_drivers(folder: Path, count: int, seed: int, real: bool = False) -> Tally:
    """Kill `count` drivers; each run goes on with what the killed one before it left.

    Of cheap cells, or of `real` ones: those of the embedded model.
    """
    tally = Tally(f"kill -9 of the driver{', real cells' if real else ''}")
    right = undisturbed(folder / "undisturbed", REAL) if real else {}
    chance = random.Random(seed)
    number = 0
    while tally.faults < count:
        number += 1
        sweep = _sweep(folder / f"driver-{number}")
        if real:
            sweep = Sweep(folder / f"real-{number}", REAL, right=right)
        while True:
            before = sweep.finished()
            with sweep.running() as driver:
                # The last run of the series is left in peace.
                killed = tally.faults < count and _wait_and_kill(sweep, driver, chance)
                done = sweep.ended(driver)
                if killed:
                    tally.faults += 1
                    tally.check_after_fault(sweep, before)
            if not killed:
                break
        tally.check_records(sweep, before)
        tally.check_second_run(sweep, done)
        sweep.remove()
    return tally


def _wait_and_kill(sweep: Sweep, driver: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """Kill the driver at a random moment; False where it had ended before."""
    if chance.random() < START_SHARE:
        _sleep(driver, chance.uniform(0, START_SECONDS))
    else:
        wanted = _done(sweep) + chance.randrange(CELLS_AHEAD)
        while _done(sweep) < wanted and driver.poll() is None:
            time.sleep(POLL_SECONDS)
        _sleep(driver, chance.uniform(0, LONGEST_STEP_SECONDS))
    if driver.poll() is not None:
        return False
    driver.kill()
    return driver.wait() == -signal.SIGKILL


def _sleep(driver: subprocess.Popen[bytes], seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        driver.wait(seconds)


def _done(sweep: Sweep) -> int:
    return len(list(sweep.runs.glob(f"*/{FILE_NAME}")))


def kill_members(folder: Path, role: str, count: int, seed: int) -> Tally:
    """Kill `count` processes of `role` (child or server), several in a run that goes on."""
    names = {"child": "kill -9 of a child", "server": "kill -9 of the fork server"}
    tally = Tally(names[role])
    chance = random.Random(seed)
    number = 0
    while tally.faults < count:
        number += 1
        sweep = _sweep(folder / f"{role}-{number}")
        before: dict[str, bytes] = {}
        with sweep.running() as driver:
            while driver.poll() is None and tally.faults < count:
                _wait(sweep, driver, role, chance)
                before |= sweep.finished()
                tally.faults += _kill_one(sweep, role, chance)
            sweep.ended(driver)
        tally.check_after_fault(sweep, before)
        before = sweep.finished()
        done = sweep.run()
        tally.check_records(sweep, before)
        tally.check_second_run(sweep, done)
        sweep.remove()
    return tally


def _wait(sweep: Sweep, driver: subprocess.Popen[bytes], role: str, chance: random.Random) -> None:
    """Wait for a random moment; mostly for one in which a cell runs, as a server starts slowly."""
    if role == "server" and chance.random() > START_SHARE:
        wanted = _done(sweep) + chance.randrange(1, CELLS_AHEAD)
        while _done(sweep) < wanted and driver.poll() is None:
            time.sleep(POLL_SECONDS)
    _sleep(driver, chance.uniform(0, LONGEST_STEP_SECONDS))


def _kill_one(sweep: Sweep, role: str, chance: random.Random) -> bool:
    victims = sweep.of_role(role)
    if not victims:
        return False
    try:
        os.kill(chance.choice(victims).pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _sweep(folder: Path) -> Sweep:
    return Sweep(folder, cheap(CELLS), {"PYTHONPATH": LIGHT})
