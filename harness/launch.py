"""Child processes: each stage of a cell runs in one of its own, with a time and a memory limit.

Children come from a fork server that has imported torch, transformers and the measures once a
sweep. A child leads a session of its own, dies with its driver and the server, writes its output to
a log and its failure to a file, and hands results over as files. Torch-free.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import psutil

from harness.memory import MemoryGroup, over_limit, reset_peak, resident_bytes
from harness.record import Failure, write_atomically
from kernels.errors import ConfigError

POLL_SECONDS = 0.05
FREE_MEMORY_SHARE = 0.9
LOG_TAIL_BYTES = 2000
PR_SET_PDEATHSIG = 1
EXIT_CONFIG = 2
EXIT_REFERENCE_MISSING = 75

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


def fork_server() -> Any:
    """Return the multiprocessing context whose server has the heavy imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "harness.preload"])
    return context


def run_child(
    target: str, job: dict[str, Any], folder: Path, limits: Limits, on_stage: Stage
) -> Outcome:
    """Run `target` (`module:function`, called with `job` and a stage callback) in a child.

    `folder` receives `<stage>.log` and, while the child runs, `stage.json` and `failure.json`.
    """
    name = target.partition(":")[0].rpartition(".")[2]
    folder.mkdir(parents=True, exist_ok=True)
    files = {key: folder / f"{name}.{key}" for key in ("log", "stage", "failure")}
    files["stage"].unlink(missing_ok=True)
    files["failure"].unlink(missing_ok=True)
    limit = limits.memory_limit_bytes or int(FREE_MEMORY_SHARE * psutil.virtual_memory().available)
    group = MemoryGroup.create(limit)
    setup = {
        "files": {key: str(path) for key, path in files.items()},
        "environment": dict(limits.environment),
        "threads": limits.usable_threads,
        "cgroup": group.join_path if group else None,
        "driver": os.getpid(),
    }
    process = fork_server().Process(target=_child, args=(target, job, setup), daemon=False)
    process.start()
    try:
        reason = _watch(process, limits.time_limit_seconds, limit, group, files["stage"], on_stage)
        failure = _failure(process.exitcode, reason, name, files)
        return Outcome(process.exitcode, failure)
    finally:
        _kill(process)
        if group:
            group.remove()
        files["stage"].unlink(missing_ok=True)
        files["failure"].unlink(missing_ok=True)


def _watch(
    process: Any,
    seconds: float,
    limit: int,
    group: MemoryGroup | None,
    stage_file: Path,
    on_stage: Stage,
) -> str | None:
    """Wait for `process`; return why it was stopped, or None where it ended by itself."""
    deadline = time.monotonic() + seconds
    start = resident_bytes(process.pid)
    seen = ""
    while not wait([process.sentinel], timeout=POLL_SECONDS):
        if time.monotonic() > deadline:
            _kill(process)
            return f"it ran longer than hardware.time_limit_seconds={seconds:g}"
        if group is None and over_limit(process.pid, start, limit):
            _kill(process)
            return _memory_reason(limit)
        seen = _report_stage(stage_file, seen, on_stage)
    process.join()
    if group is not None and group.killed_for_memory():
        return _memory_reason(limit)
    return None


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


def _failure(
    exit_code: int, reason: str | None, stage: str, files: Mapping[str, Path]
) -> Failure | None:
    if reason is not None:
        return Failure(stage, "limit", f"the {stage} process was stopped: {reason}")
    if exit_code == 0:
        return None
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
        text = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])


def _child(target: str, job: dict[str, Any], setup: dict[str, Any]) -> None:
    """Entry of every child; never returns to multiprocessing's own error printing."""
    parent = os.getppid()
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _end_with(setup["driver"])
    files = {key: Path(path) for key, path in setup["files"].items()}
    log = os.open(files["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(setup["environment"])
    if setup["cgroup"]:
        Path(setup["cgroup"]).write_text(str(os.getpid()))
    job = {**job, "resident_at_start": reset_peak()}
    module, _, function = target.partition(":")
    stage = module.rpartition(".")[2]
    code = 0
    try:
        # The server ignores a failed preload; here it comes out as what it is.
        import_module("harness.preload").limit_threads(setup["threads"])
        getattr(import_module(module), function)(job, lambda text: _say(files["stage"], text))
    except BaseException as error:  # noqa: BLE001  # whatever ends a child is written down
        traceback.print_exc()
        failure = _describe(stage, error)
        files["failure"].write_text(json.dumps(failure.__dict__))
        code = {"config": EXIT_CONFIG, "reference": EXIT_REFERENCE_MISSING}.get(failure.kind, 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with(driver: int) -> None:
    """End this process and all it started as soon as process `driver` has ended, even by SIGKILL.

    The server alone is no sign of that: each child holds the pipe by whose end the server notices
    that nobody needs it any more.
    """
    try:
        ended = os.pidfd_open(driver)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        select.select([ended], [], [])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="driver", daemon=True).start()


def _say(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def _describe(stage: str, error: BaseException) -> Failure:
    text = " ".join(str(error).split())
    if isinstance(error, ConfigError):
        return Failure(stage, "config", text)
    if type(error).__name__ == "ReferenceMissingError":
        return Failure(stage, "reference", text)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return Failure(stage, "memory", f"the {stage} process ran out of memory: {text}")
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return Failure(stage, "system", f"{error.strerror}{where} while in the {stage} process")
    return Failure(stage, type(error).__name__, f"{type(error).__name__}: {text}")
