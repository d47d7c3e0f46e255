"""A run of `run.py` that is to be harmed: its processes, its records, and what it leaves behind.

Everything a run starts carries a mark in its environment, by which orphans are found, and has a
temporary folder of its own, so that what stays there is this run's.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from harness.memory import PREFIX, group_parents
from harness.owner import PROC, parse_owner
from harness.record import FILE_NAME, Record, read_records
from tests.faults.child import right_value

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).resolve().parent
LIGHT = str(FAULTS / "light")
MARK = "QUANTBENCH_FAULTS_MARK"
REAL = ("-m", "method=fp32,rtn", "bits=4", "group_size=32", "suite=smoke")
MEASURED_ANEW = ("s", "tokens/s", "B", "B/s", "ratio")
"""Units of figures that differ from run to run: times, rates, memory, how much times spread."""
TORCHS_CACHE = "torchinductor_"
"""A folder that torch keeps in the system's temporary folder from run to run."""
HANG_SECONDS = 600
GONE_SECONDS = 60
POLL_SECONDS = 0.01

Lasting = dict[tuple[str, str], float]
"""(metric, protocol) -> value."""


def cheap(cells: int) -> list[str]:
    """Return the arguments of a grid of `cells` cells that cost nothing."""
    seeds = ",".join(map(str, range(cells)))
    return ["-m", f"--config-dir={FAULTS / 'conf'}", "job=faults", "suite=smoke", f"seed={seeds}"]


@dataclass(frozen=True)
class Done:
    """How a run ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Process:
    """A process of a run: its number, and what it is."""

    pid: int
    role: str


@dataclass
class Sweep:
    """One command on one run folder, as often as it takes.

    Attributes:
        folder: run folder, outputs and temporary files go below it.
        arguments: of `run.py`, without `runs_dir`.
        environment: beside that of this process.
        outputs: folder of what the runs print, `folder` where none is given.
        right: real cell -> its values that do not change from run to run.
    """

    folder: Path
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    outputs: Path | None = None
    right: Mapping[str, Lasting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.drivers: list[int] = []
        self.mark = secrets.token_hex(16)
        self.folder.mkdir(parents=True, exist_ok=True)
        outputs = self.outputs or self.folder
        self.out, self.err = outputs / "out.txt", outputs / "err.txt"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start the run; what is left of it at the end of the block is killed."""
        command = [sys.executable, str(ROOT / "run.py"), *self.arguments, f"runs_dir={self.runs}"]
        environment = {**os.environ, **self.environment, MARK: self.mark}
        environment["TMPDIR"] = str(self.temporary)
        with self.out.open("wb") as out, self.err.open("wb") as err:
            # A group of its own, as a shell gives it: signals to it are none to the tests.
            driver = subprocess.Popen(
                command, stdout=out, stderr=err, env=environment, cwd=ROOT, process_group=0,
                preexec_fn=_hear_signals,
            )  # fmt: skip
        self.drivers.append(driver.pid)
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()
            for process in self.living():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    @property
    def temporary(self) -> Path:
        """Its temporary folder: a short path, since sockets are made in it."""
        path = Path("/tmp") / f"qb{self.mark[:8]}"
        path.mkdir(exist_ok=True)
        return path

    def run(self) -> Done:
        """Run it to its end."""
        with self.running() as driver:
            return self.ended(driver)

    def ended(self, driver: subprocess.Popen[bytes]) -> Done:
        """Wait for the end of `driver`."""
        code = driver.wait(timeout=HANG_SECONDS)
        return Done(code, self.out.read_text(), self.err.read_text())

    def living(self) -> list[Process]:
        """Return the living processes of the run."""
        mark = f"{MARK}={self.mark}".encode()
        found = []
        for place in (entry for entry in PROC.iterdir() if entry.name.isdigit()):
            try:
                if mark not in (place / "environ").read_bytes():
                    continue
                state, _, _, session = (place / "stat").read_text().rpartition(")")[2].split()[:4]
                line = (place / "cmdline").read_bytes()
            except OSError:
                continue
            if state not in "ZX":
                found.append(Process(int(place.name), _role(line, session == place.name)))
        return found

    def of_role(self, role: str) -> list[Process]:
        """Return the living processes of one role: driver, server, child or other."""
        return [process for process in self.living() if process.role == role]

    def orphans(self) -> list[Process]:
        """Return what still lives once nothing of the run should: after patience, or none."""
        deadline = time.monotonic() + GONE_SECONDS
        while (found := self.living()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def records(self) -> list[Record]:
        """Return the records that can be read."""
        return read_records(self.runs)[0]

    def finished(self) -> dict[str, bytes]:
        """Return cell -> bytes of its record, of those that are ok."""
        return {
            record.cell: (self.runs / record.cell / FILE_NAME).read_bytes()
            for record in self.records()
            if record.status == "ok"
        }

    def leftovers(self) -> list[Path]:
        """Return temporary files and folders of the run, and control groups of its drivers."""
        own = [p for p in self.temporary.iterdir() if not p.name.startswith(TORCHS_CACHE)]
        names = [*self.runs.rglob("*.tmp"), *own]
        groups = [group for _, parent in group_parents() for group in parent.glob(f"{PREFIX}*")]
        owners = [(group, parse_owner(group.name)) for group in groups]
        return names + [group for group, owner in owners if owner and owner.pid in self.drivers]

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def wrong_values(self) -> list[str]:
        """Return a sentence for each value, or each real cell, that is not as it has to be."""
        found = []
        for record in self.records():
            if record.config["job"] == "faults":
                found += _wrong_values(record)
            elif record.status == "ok" and record.cell in self.right:
                right, own = self.right[record.cell], lasting(record)
                other = [key for key in {*right, *own} if right.get(key) != own.get(key)]
                found += [
                    f"{record.cell}: {key} is {own.get(key)}, undisturbed {right.get(key)}"
                    for key in other
                ]
        return found


def _hear_signals() -> None:
    """Undo what nohup and a shell's background jobs told this process to ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def undisturbed(folder: Path, arguments: Sequence[str]) -> dict[str, Lasting]:
    """Return what does not change from run to run of the cells of `arguments`, run in peace."""
    sweep = Sweep(folder, arguments)
    sweep.run()
    right = {record.cell: lasting(record) for record in sweep.records()}
    sweep.remove()
    return right


def lasting(record: Record) -> Lasting:
    """Return the values of a record that are no times, rates or sizes of processes."""
    return {(v.metric, v.protocol): v.value for v in record.values if v.unit not in MEASURED_ANEW}


def _wrong_values(record: Record) -> list[str]:
    seed = record.config["resolved"]["seed"]
    return [
        f"{record.cell}: {value.metric} is {value.value}, not {right_value(value.metric, seed)}"
        for value in record.values
        if {value.value, *value.samples} != {right_value(value.metric, seed)}
    ]


def _role(command: bytes, leads_session: bool) -> str:
    if b"run.py" in command and b"forkserver" not in command:
        return "driver"
    if b"forkserver" in command:
        return "child" if leads_session else "server"
    return "other"
