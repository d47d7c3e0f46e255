"""Children that do what none should: hang, take memory, fill their log, leave processes behind."""

from __future__ import annotations

from pathlib import Path

from tests.faults.child import MISBEHAVES, WAYS
from tests.faults.sweep import LIGHT, Sweep, cheap
from tests.faults.tally import Tally

LIMITED = ["hardware.time_limit_seconds=15", f"hardware.memory_limit_bytes={200 << 20}"]

SAID = {
    "hang": "longer than hardware.time_limit_seconds=15",
    "memory": "more memory than its limit of 200 MiB",
    "log": "more than 64 MiB to its log",
    "leave": "ended with exit code 7",
}
"""What is said of a child that does one of `tests.faults.child.WAYS`."""


def misbehave(folder: Path) -> Tally:
    """Run a cell in peace and one for each way to misbehave, then all of them in peace."""
    tally = Tally("a child that hangs, takes memory, fills its log, leaves processes")
    arguments = [*cheap(1 + len(WAYS)), *LIMITED]
    sweep = Sweep(folder, arguments, {"PYTHONPATH": LIGHT, MISBEHAVES: "yes"})
    done = sweep.run()
    before = sweep.finished()
    tally.faults += len(WAYS)
    tally.check_after_fault(sweep, before)
    failures = [
        error.message for r in sweep.records() if r.status == "failed" for error in r.errors
    ]
    unsaid = [how for how, said in SAID.items() if not any(said in each for each in failures)]
    if done.code != 1 or unsaid or len(before) != 1 or "Traceback" in done.err:
        tally.sentences.append(f"status {done.code}, not said {unsaid}: {failures}, {done.err}")
    sweep.environment = {"PYTHONPATH": LIGHT}
    done = sweep.run()
    tally.check_records(sweep, before)
    tally.check_second_run(sweep, done)
    sweep.remove()
    return tally
