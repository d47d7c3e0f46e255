"""Child processes: each stage of a cell runs in one of its own, with a time and a memory limit.

Children come from a fork server that has imported torch, transformers and the measures once a
sweep. A child leads a session of its own, dies with its driver and the server, writes its output to
a log and its failure to a file, and hands results over as files. What it puts into the system's
temporary folder is removed behind it. Torch-free.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import psutil

from harness.device import WAITING
from harness.family import Family
from harness.fork_server import start
from harness.memory import MemoryGroup, over_limit, reset_peak, resident_bytes
from harness.record import Failure, write_atomically
from harness.redact import redact, redact_file
from harness.temporary import remove, temporary_beside
from kernels.errors import ConfigError

POLL_SECONDS = 0.05
LOST_SECONDS = 5.0
"""Between two looks whether others have taken the work over, each a question to the server."""
FREE_MEMORY_SHARE = 0.9
LOG_TAIL_BYTES = 2000
LOG_TAIL_READ_BYTES = 1 << 16
MOST_LOG_BYTES = 64 << 20
PR_SET_PDEATHSIG = 1
EXIT_CONFIG = 2
EXIT_REFERENCE_MISSING = 75
EXIT_ERRNO = 128
"""And the error's number: of a child that could not even write down why it failed (disk full)."""
EXIT_SERVER_LOST = 255
"""What multiprocessing says of a child whose fork server has ended, and the child with it."""
LIMIT = "limit"
"""Kind of the failure of a child that reached its limit of time or memory."""
TAKEN_OVER = "taken over"
"""Kind of the failure of a child that was stopped since another sweep does its work now."""

Stage = Callable[[str], None]


class Limits(Protocol):
    """The part of `harness.hardware.Hardware` that limits a child."""

    @property
    def memory_limit_bytes(self) -> int | None:
        """Bytes beyond what the child starts with."""
        ...

    @property
    def time_limit_seconds(self) -> float:
        """Wall-clock seconds."""
        ...

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables set in the child."""
        ...

    @property
    def usable_threads(self) -> int:
        """CPU threads."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a child ended; `failure` is None where it did what it was asked."""

    exit_code: int
    failure: Failure | None

    @property
    def ok(self) -> bool:
        """Whether the child finished its work."""
        return self.failure is None


def run_child(
    target: str,
    job: dict[str, Any],
    folder: Path,
    limits: Limits,
    on_stage: Stage,
    lost: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run `target` (`module:function`, called with `job` and a stage callback) in a child.

    `folder` receives `<stage>.log` and, while the child runs, `stage.json` and `failure.json`. The
    child is stopped once `lost` says that its work is no longer this process's to do.
    """
    name = target.partition(":")[0].rpartition(".")[2]
    folder.mkdir(parents=True, exist_ok=True)
    files = {key: folder / f"{name}.{key}" for key in ("log", "stage", "failure")}
    for path in files.values():
        path.unlink(missing_ok=True)
    limit = limits.memory_limit_bytes or int(FREE_MEMORY_SHARE * psutil.virtual_memory().available)
    group = MemoryGroup.create(limit)
    place = limits.environment.get("TMPDIR") or tempfile.gettempdir()
    scratch = temporary_beside(Path(place) / "quantbench")
    family = Family(str(scratch), group.join_path if group else None)
    setup = {
        "files": {key: str(path) for key, path in files.items()},
        "scratch": str(scratch),
        "environment": dict(limits.environment),
        "threads": limits.usable_threads,
        "cgroup": family.group,
        "driver": os.getpid(),
    }
    watch = _Watch(limits.time_limit_seconds, limit, group, files, on_stage, lost)
    process = None
    try:
        scratch.mkdir()
        process = start(_child, (target, job, setup))
        if process is None:
            return Outcome(EXIT_SERVER_LOST, _failure(EXIT_SERVER_LOST, name, files))
        stopped = watch.run(process)
        if stopped is not None:
            kind, reason = stopped
            failure: Failure | None = Failure(
                name, kind, f"the {name} process was stopped: {reason}"
            )
        else:
            failure = _failure(process.exitcode, name, files)
        return Outcome(process.exitcode, failure)
    finally:
        if process is not None:
            _kill(process)
            family.end(process.pid)
        if group:
            group.remove()
        redact_file(files["log"])
        remove(scratch)
        files["stage"].unlink(missing_ok=True)
        files["failure"].unlink(missing_ok=True)


@dataclass
class _Watch:
    """What a driver looks at while its child runs."""

    seconds: float
    memory_bytes: int
    group: MemoryGroup | None
    files: Mapping[str, Path]
    on_stage: Stage
    lost: Callable[[], bool]

    def run(self, process: Any) -> tuple[str, str] | None:
        """Wait for `process`; return (kind, reason) where it was stopped, None where it ended."""
        begun = looked = time.monotonic()
        deadline = begun + self.seconds
        start = resident_bytes(process.pid)
        seen = ""
        while not wait([process.sentinel], timeout=POLL_SECONDS):
            now = time.monotonic()
            if seen.startswith(WAITING):
                deadline += now - looked
            if now - begun > LOST_SECONDS:
                begun = now
                if self.lost():
                    _kill(process)
                    return TAKEN_OVER, "another sweep has taken its work over"
            looked = now
            if now > deadline:
                _kill(process)
                return LIMIT, f"it ran longer than hardware.time_limit_seconds={self.seconds:g}"
            if self.group is None and over_limit(process.pid, start, self.memory_bytes):
                _kill(process)
                return LIMIT, _memory_reason(self.memory_bytes)
            if _size(self.files["log"]) > MOST_LOG_BYTES:
                _kill(process)
                return LIMIT, f"it wrote more than {MOST_LOG_BYTES / 2**20:.0f} MiB to its log"
            seen = _report_stage(self.files["stage"], seen, self.on_stage)
        process.join()
        if self.group is not None and self.group.killed_for_memory():
            return LIMIT, _memory_reason(self.memory_bytes)
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _memory_reason(limit: int) -> str:
    return f"it needed more memory than its limit of {limit / 2**20:,.0f} MiB"


def _report_stage(path: Path, seen: str, on_stage: Stage) -> str:
    try:
        stage = path.read_text()
    except FileNotFoundError:
        return seen
    if stage != seen:
        on_stage(stage)
    return stage


def _kill(process: Any) -> None:
    """End the child and everything it started."""
    if process.pid is None:
        return
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            # The child has not yet become the leader of its group.
            process.kill()
        process.join()


def _failure(exit_code: int, stage: str, files: Mapping[str, Path]) -> Failure | None:
    if exit_code == 0:
        return None
    if exit_code == EXIT_SERVER_LOST:
        what = f"the {stage} process ended with the fork server that it came from"
        return Failure(stage, "server", what)
    if exit_code > EXIT_ERRNO:
        return Failure(stage, "system", _system(os.strerror(exit_code - EXIT_ERRNO), "", stage))
    try:
        return Failure(**json.loads(files["failure"].read_text()))
    except (OSError, ValueError, TypeError):
        pass  # it died without a word: the exit code and the log have to speak
    tail = _tail(files["log"])
    said = f"; its last words: {tail}" if tail else ""
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return Failure(stage, name, f"the {stage} process was killed by {name}{said}")
    return Failure(stage, "exit", f"the {stage} process ended with exit code {exit_code}{said}")


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_READ_BYTES))
            # Cut afterwards, or half a key would be left.
            text = redact(file.read().decode(errors="replace"))[-LOG_TAIL_BYTES:]
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])


def _child(target: str, job: dict[str, Any], setup: dict[str, Any]) -> None:
    """Entry of every child; never returns to multiprocessing's own error printing."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not _comes_from(setup["driver"]):
        os._exit(1)  # the server had ended before its death was asked to be told of
    _end_with(setup["driver"], Family(setup["scratch"], setup["cgroup"]))
    files = {key: Path(path) for key, path in setup["files"].items()}
    try:
        log = os.open(files["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        os._exit(_exit_of(error))
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(setup["environment"])
    os.environ["TMPDIR"] = tempfile.tempdir = setup["scratch"]
    module, _, function = target.partition(":")
    stage = module.rpartition(".")[2]
    code = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if setup["cgroup"]:
            Path(setup["cgroup"]).write_text(str(os.getpid()))
        job = {**job, "resident_at_start": reset_peak()}
        # The server ignores a failed preload; here it comes out as what it is.
        import_module("harness.preload").limit_threads(setup["threads"])
        getattr(import_module(module), function)(job, lambda text: _say(files["stage"], text))
    except BaseException as error:  # noqa: BLE001  # whatever ends a child is written down
        with suppress(OSError):
            sys.stderr.write(redact(traceback.format_exc()))
        code = _write_down(_describe(stage, error), files["failure"])
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _comes_from(driver: int) -> bool:
    """Whether the parent, the fork server, is a child of process `driver`; not if it has ended."""
    try:
        return bool(psutil.Process(os.getppid()).ppid() == driver)
    except psutil.NoSuchProcess:
        return False


def _write_down(failure: Failure, path: Path) -> int:
    """Write `failure` for the driver; return the child's exit code."""
    try:
        path.write_text(json.dumps(failure.__dict__))
    except OSError as error:
        return _exit_of(error)
    return {"config": EXIT_CONFIG, "reference": EXIT_REFERENCE_MISSING}.get(failure.kind, 1)


def _exit_of(error: OSError) -> int:
    return EXIT_ERRNO + min(error.errno or 0, EXIT_SERVER_LOST - EXIT_ERRNO - 1)


def _end_with(driver: int, family: Family) -> None:
    """End this process and all it started as soon as process `driver` has ended, even by SIGKILL.

    The server alone is no sign of that: each child holds the pipe by whose end the server notices
    that nobody needs it any more.
    """

    def end() -> None:
        family.end(os.getpid())
        os.killpg(0, signal.SIGKILL)

    _when_ended(driver, end)


def end_with_parent() -> None:
    """End this process as soon as its parent has ended, even by SIGKILL.

    For workers of a launcher, which would go on with the cells they have been given.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != os.getppid():
        os._exit(1)  # it had ended before this process could ask to be told of it
    _when_ended(parent.pid, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _when_ended(pid: int, do: Callable[[], None]) -> None:
    """Call `do` in a thread once process `pid` has ended; ends this one where it has already."""
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        select.select([ended], [], [])
        do()

    threading.Thread(target=watch, name=f"end of {pid}", daemon=True).start()


def _say(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def _describe(stage: str, error: BaseException) -> Failure:
    text = redact(" ".join(str(error).split()))
    if isinstance(error, ConfigError):
        return Failure(stage, "config", text)
    if type(error).__name__ == "ReferenceMissingError":
        return Failure(stage, "reference", text)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return Failure(stage, "memory", f"the {stage} process ran out of memory: {text}")
    if isinstance(error, OSError) and error.strerror:
        return Failure(stage, "system", _system(error.strerror, error.filename, stage))
    return Failure(stage, type(error).__name__, f"{type(error).__name__}: {text}")


def _system(reason: str, file: str | None, stage: str) -> str:
    where = f" ({file})" if file else ""
    return f"{reason}{where} while in the {stage} process"
