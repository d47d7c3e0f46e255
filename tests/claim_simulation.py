"""Many workers, one folder, the real claims: what they cost; no cell lost, none done twice.

`python -m tests.claim_simulation --workers 64 --cells 2000`: every worker goes over all the cells
in an order of its own, as a sweep does: it takes those that are free, leaves those that others hold
for later, and comes back to them at the end. Groups of workers pretend to be machines, which cannot
ask whether a process of another one lives. Some workers are killed and some stand still for longer
than `Pace.abandoned`, at moments drawn with a seed.

A cell's work is a short sleep and then its record, written as a real one is: nobody who was taken
over replaces another's. A log (O_APPEND) has a line `begin` before the sleep, `end` after the
record, and `late` instead where the worker was told that others took over. Every line names the
worker and the number of its claim.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness import owner
from harness.claim import Held, Pace, TakenOverError, claim, still_held
from harness.record import FILE_NAME, write_atomically
from harness.temporary import remove_unfinished

WORK_SECONDS = 0.02
STILL = 4
"""How many times `Pace.abandoned` a stopped worker stands still: others wait for its cell, and so
count the time without a heartbeat, only once their own work is done."""
MACHINE_WORKERS = 4
"""Workers that pretend to be one machine."""
COUNTED = {"os.scandir": "list", "os.mkdir": "mkdir", "os.utime": "utime"}


@dataclass(frozen=True)
class Setting:
    """What is simulated; `killed` and `stopped` are numbers of workers."""

    workers: int
    cells: int
    killed: int
    stopped: int
    seed: int
    pace: Pace
    folder: Path

    def cell(self, number: int) -> Path:
        return self.folder / f"cell-{number:05d}"


@dataclass
class Seen:
    """What one worker saw, in seconds and operations.

    Attributes:
        take: to take a free claim, a figure a cell.
        release: to let go of it.
        processor: both together, of the processor's time.
        waited: spent waiting for cells of others after its own were done.
        operations: kind -> number, of the claims taken without waiting.
        passes: the same, of looks at cells that others held.
        passed: number of these looks.
    """

    take: list[float] = field(default_factory=list)
    release: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    waited: float = 0.0
    operations: dict[str, int] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    passed: int = 0


class HeldElsewhereError(Exception):
    """Somebody else holds the cell."""


def pass_on(holder: str) -> None:
    raise HeldElsewhereError(holder)


def finished(cell: Path) -> bool:
    return (cell / FILE_NAME).exists()


def note(cell: Path, line: str) -> None:
    descriptor = os.open(cell / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


class Counting:
    """Counts what is asked of the file system about claims, as Python's audit events show it."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.counts: Counter[str] = Counter()
        self.paused = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in COUNTED:
            return
        path = str(arguments[0])
        # What claims cost alone: the log is the simulation's, the record is every cell's.
        if self.paused or not path.startswith(self.folder) or path.endswith("log"):
            return
        if event != "open":
            self.counts[COUNTED[event]] += 1
        else:
            self.counts["create" if arguments[2] & os.O_CREAT else "open"] += 1


class Worker:
    """One sweep of one cell at a time."""

    def __init__(self, number: int, setting: Setting, begun: Any) -> None:
        self.number, self.setting, self.begun = number, setting, begun
        self.seen = Seen()
        self.counting = Counting(setting.folder)

    def run(self) -> None:
        """Go over all cells, then wait for those that others held."""
        order = list(range(self.setting.cells))
        random.Random(f"{self.setting.seed} {self.number}").shuffle(order)
        deferred = []
        for number in order:
            if finished(self.setting.cell(number)):
                continue
            before = self.counting.counts.copy()
            try:
                self._cell(self.setting.cell(number))
            except HeldElsewhereError:
                deferred.append(number)
                self._count(self.seen.passes, before)
                self.seen.passed += 1
        for number in deferred:
            cell = self.setting.cell(number)
            if not finished(cell):
                self._wait(cell)
        path = self.setting.folder / f"worker-{self.number}.json"
        path.write_text(json.dumps(asdict(self.seen)))

    def _cell(self, cell: Path) -> None:
        before = self.counting.counts.copy()
        start, used = time.perf_counter(), time.process_time()
        with claim(cell / "claim", pass_on, pace=self.setting.pace) as held:
            self.seen.take.append(time.perf_counter() - start)
            taking = time.process_time() - used
            assert held is not None
            self._work(cell, held)
            start, used = time.perf_counter(), time.process_time()
        self.seen.release.append(time.perf_counter() - start)
        self.seen.processor.append(taking + time.process_time() - used)
        self._count(self.seen.operations, before)

    def _wait(self, cell: Path) -> None:
        start = time.perf_counter()
        with claim(
            cell / "claim", lambda holder: None, lambda: finished(cell), self.setting.pace
        ) as held:
            self.seen.waited += time.perf_counter() - start
            if held is not None:
                self._work(cell, held)

    def _work(self, cell: Path, held: Held) -> None:
        self.begun[self.number] += 1
        self.counting.paused = True
        try:
            remove_unfinished(cell)
            if finished(cell):
                return
            who = f"{self.number} {held.path.suffix[1:]}"
            note(cell, f"begin {who}")
            time.sleep(random.expovariate(1 / WORK_SECONDS))
            try:
                with still_held(held.path) as last_look:
                    write_atomically(cell / FILE_NAME, who.encode(), last_look)
            except TakenOverError:
                note(cell, f"late {who}")
            else:
                note(cell, f"end {who}")
        finally:
            self.counting.paused = False

    def _count(self, into: dict[str, int], before: Counter[str]) -> None:
        for kind, count in (self.counting.counts - before).items():
            into[kind] = into.get(kind, 0) + count


def work(number: int, setting: Setting, begun: Any) -> None:
    """Be one worker, on a machine of its group."""
    owner._machine = lambda: f"{number // MACHINE_WORKERS:012x}"  # type: ignore[assignment]
    random.seed(f"{setting.seed} work {number}")
    Worker(number, setting, begun).run()


@dataclass(frozen=True)
class Outcome:
    """What the logs say.

    Attributes:
        lost: cells without a record.
        twice: cells with more than one `end`.
        together: times that a worker began while another one was at the same cell that neither had
            been killed nor was told that it was late.
        killed_inside: cells begun by a worker that was killed before their end.
        late: cells whose worker was told so.
        again: begins beyond the first of a cell.
        generations: claims of the cell that has most.
        struck: workers that were killed or stopped.
    """

    lost: int
    twice: int
    together: int
    killed_inside: int
    late: int
    again: int
    generations: int
    struck: int

    @property
    def good(self) -> bool:
        return self.lost == self.twice == self.together == 0


def judge(setting: Setting, killed: Sequence[int], struck: int) -> Outcome:
    """Read every cell's log; `killed` are workers, `struck` how many were killed or stopped."""
    counts: Counter[str] = Counter()
    most = 0
    for number in range(setting.cells):
        cell = setting.cell(number)
        text = (cell / "log").read_text() if (cell / "log").exists() else ""
        lines = [line.split() for line in text.splitlines()]
        kinds = Counter(kind for kind, _, _ in lines)
        counts["lost"] += not finished(cell)
        counts["twice"] += kinds["end"] > 1
        counts["late"] += kinds["late"]
        counts["again"] += max(0, kinds["begin"] - 1)
        said_late = {(who, claimed) for kind, who, claimed in lines if kind == "late"}
        inside: set[tuple[str, str]] = set()
        for kind, who, claimed in lines:
            if kind == "begin":
                counts["together"] += bool(inside)
                # Who is killed or overtaken is not at it any more, whatever it does then.
                if int(who) not in killed and (who, claimed) not in said_late:
                    inside.add((who, claimed))
            else:
                inside.discard((who, claimed))
        ended = {(who, claimed) for kind, who, claimed in lines if kind != "begin"}
        open_ = {(who, claimed) for kind, who, claimed in lines if kind == "begin"} - ended
        counts["killed_inside"] += sum(int(who) in killed for who, _ in open_)
        most = max(most, len(list(cell.glob("claim.*"))))
    return Outcome(
        lost=counts["lost"],
        twice=counts["twice"],
        together=counts["together"],
        killed_inside=counts["killed_inside"],
        late=counts["late"],
        again=counts["again"],
        generations=most,
        struck=struck,
    )


@contextmanager
def workers(setting: Setting) -> Iterator[tuple[list[Any], Any]]:
    """Start the workers; none outlives the block."""
    context = multiprocessing.get_context("fork")
    begun = context.RawArray("q", setting.workers)
    processes = [
        context.Process(target=work, args=(number, setting, begun))
        for number in range(setting.workers)
    ]
    for process in processes:
        process.start()
    try:
        yield processes, begun
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def simulate(setting: Setting) -> tuple[Outcome, float]:
    """Run the workers, kill and stop some on the way; return the outcome and the seconds."""
    draw = random.Random(setting.seed)
    victims = draw.sample(range(setting.workers), setting.killed + setting.stopped)
    killed = victims[: setting.killed]
    # A victim's turn comes when so many cells have been begun, and a moment later.
    turns = sorted((draw.uniform(0.02, 0.7) * setting.cells, who) for who in victims)
    sleeping: list[tuple[float, Any]] = []
    struck = 0
    start = time.monotonic()
    with workers(setting) as (processes, begun):
        while any(process.is_alive() for process in processes):
            while turns and sum(begun) >= turns[0][0]:
                process = processes[turns[0][1]]
                time.sleep(draw.uniform(0, 2 * WORK_SECONDS))
                if process.is_alive():
                    how = signal.SIGKILL if turns[0][1] in killed else signal.SIGSTOP
                    os.kill(process.pid, how)
                    struck += 1
                    if how == signal.SIGSTOP:
                        awake = time.monotonic() + STILL * setting.pace.abandoned
                        sleeping.append((awake, process))
                turns.pop(0)
            while sleeping and time.monotonic() > sleeping[0][0]:
                os.kill(sleeping.pop(0)[1].pid, signal.SIGCONT)
            time.sleep(0.005)
        seconds = time.monotonic() - start
    return judge(setting, killed, struck), seconds


def seen_by(setting: Setting) -> list[Seen]:
    """Return what those saw that came to their end."""
    found = sorted(setting.folder.glob("worker-*.json"))
    return [Seen(**json.loads(path.read_text())) for path in found]


def table(setting: Setting, outcome: Outcome, seconds: float) -> str:
    """Return what is to be read."""
    seen = seen_by(setting)
    takes = [value for one in seen for value in one.take]
    releases = [value for one in seen for value in one.release]
    free = sum(len(one.take) for one in seen)
    passed = sum(one.passed for one in seen)

    def spread(values: Sequence[float]) -> str:
        cuts = statistics.quantiles(values, n=100)
        return f"median {1e3 * statistics.median(values):.2f} ms, 99 % {1e3 * cuts[98]:.1f} ms"

    def operations(one: str, among: int) -> str:
        total: Counter[str] = Counter()
        for each in seen:
            total.update(getattr(each, one))
        return ", ".join(f"{kind} {count / max(among, 1):.2f}" for kind, count in total.items())

    rows = {
        "workers, cells": f"{setting.workers}, {setting.cells}",
        "killed, stopped workers": (
            f"{setting.killed}, {setting.stopped}; {outcome.struck} had not ended before"
        ),
        "cells lost": outcome.lost,
        "cells finished twice": outcome.twice,
        "two at one cell": outcome.together,
        "begun again": outcome.again,
        "  their worker was killed": outcome.killed_inside,
        "  their worker stood still, and was told": outcome.late,
        "most claims of one cell": outcome.generations,
        "to take a free claim": spread(takes),
        "to release it": spread(releases),
        "both, time of the processor": spread([p for one in seen for p in one.processor]),
        "operations a claim taken": operations("operations", free),
        "operations a look at a held cell": operations("passes", passed),
        "looks at held cells, a worker": f"{passed / max(len(seen), 1):.1f}",
        "a worker waited at the end": (
            f"median {statistics.median(one.waited for one in seen):.1f} s, "
            f"most {max(one.waited for one in seen):.1f} s"
        ),
        "all": f"{seconds:.1f} s, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
    }
    return "\n".join(f"{name:42} {value}" for name, value in rows.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m tests.claim_simulation`; 0 where no cell was lost or done twice."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--killed", type=int, help="workers; a quarter of all where not given")
    parser.add_argument("--stopped", type=int, help="workers; a quarter of all where not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beat", type=float, default=0.5, help="seconds between heartbeats")
    parser.add_argument("--abandoned", type=float, default=5.0, help="seconds until taken over")
    parser.add_argument("--folder", type=Path, help="where; the system's temporary folder else")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON alone")
    asked = parser.parse_args(arguments)
    pace = Pace(asked.beat, asked.abandoned, poll=0.02, longest_poll=0.2)
    quarter = asked.workers // 4
    killed = quarter if asked.killed is None else asked.killed
    stopped = quarter if asked.stopped is None else asked.stopped
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        setting = Setting(
            asked.workers, asked.cells, killed, stopped, asked.seed, pace, Path(folder)
        )
        outcome, seconds = simulate(setting)
        print(json.dumps(asdict(outcome)) if asked.json else table(setting, outcome, seconds))
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
