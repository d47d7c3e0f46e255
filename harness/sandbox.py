"""Runs one Python program that nobody has read, in a child that can reach nothing.

Each program gets a fresh process with no network, its own users, mounts, processes and ipc, a
read-only root that holds the standard library, the installed packages and the shared libraries,
an empty scratch directory, and limits on time, memory, processes and files; how that is built is
said in `harness/sandbox_child.py`. Where it cannot be had, nothing is run.

A program passes where it ran to its end: leaving early by any exit, signal or exception is no
pass, and what it prints counts for nothing. Not defended against: a program that searches the
frames of its own interpreter for the token that says it reached its end, or whose results compare
equal to everything; an error in the kernel; and what a program learns from the processor's time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harness.sandbox_filter import call_filter
from kernels.errors import ConfigError

CHILD = Path(__file__).with_name("sandbox_child.py")
MEBIBYTE = 2**20
# Beyond the program's own deadline: start and end of the processes on a loaded machine.
MARGIN_SECONDS = 30
HOME = "/tmp"  # nosec B108  # of the program's own root
# All that the program sees of an environment. One hash seed: a verdict that hangs on the order of
# a set would change from run to run. One thread: OpenBLAS reserves memory for each.
ENVIRONMENT = MappingProxyType(
    {
        "HOME": HOME,
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0",
        "TMPDIR": HOME,
    }
)
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: wall-clock seconds of the program with all it starts.
        cpu_seconds: processor seconds of each of its processes.
        memory_mib: address space of each of its processes, MiB.
        processes: processes and threads at once.
        file_mib: size of a file, and of all files together, MiB.
        open_files: open files of each process.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_mib: int = 512
    processes: int = 8
    file_mib: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"the sandbox's {name} is {value}; it must be above 0")


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `reason` is `passed`, or what it died of."""

    passed: bool
    reason: str


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run the Python program `source` in isolation and return how it ended.

    Raises:
        ConfigError: this machine cannot isolate it; it has not been run.
    """
    if not sys.platform.startswith("linux"):
        raise _refused(f"the system is {sys.platform}")
    machine = os.uname().machine
    filtered = call_filter(machine)
    if filtered is None:
        raise _refused(f"the processor is {machine}")
    limits = limits or Limits()
    job = {"source": source, "call_filter": filtered.hex(), **_numbers(limits), **_root()}
    # Own flags instead of -I, which would also ignore the hash seed.
    command = [sys.executable, "-B", "-P", "-s", "-S", str(CHILD)]
    try:
        finished = subprocess.run(
            command,
            input=json.dumps(job).encode(),
            capture_output=True,
            env=dict(ENVIRONMENT),
            cwd="/",
            timeout=limits.seconds + MARGIN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refused("its supervisor gave no answer") from None
    return _outcome(finished)


def _outcome(finished: subprocess.CompletedProcess[bytes]) -> Outcome:
    try:
        said: dict[str, Any] = json.loads(finished.stdout)
    except ValueError:
        lines = finished.stderr.decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no word")
        raise _refused(f"its process ended with {finished.returncode} and said: {last}") from None
    if "refused" in said:
        raise _refused(said["refused"])
    return Outcome(said["passed"], said["reason"])


def _refused(missing: str) -> ConfigError:
    return ConfigError(
        f"generated code cannot be isolated on this machine ({missing}), so it is not run: it"
        " takes Linux 5.12 or newer on x86_64 or aarch64 that allows user namespaces (in a"
        " container, mostly only with CAP_SYS_ADMIN)"
    )


def _numbers(limits: Limits) -> dict[str, float]:
    return {
        "seconds": limits.seconds,
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_mib * MEBIBYTE,
        "processes": limits.processes,
        "file_bytes": limits.file_mib * MEBIBYTE,
        "open_files": limits.open_files,
    }


@cache
def _root() -> dict[str, Any]:
    """Return what is readable: real paths, links to them, and the packages' places on the path."""
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    standard = sysconfig.get_paths()["stdlib"]
    wanted = [standard, str(Path(sys.base_prefix) / "lib"), *packages, *SYSTEM_LIBRARIES]
    real = {path: os.path.realpath(path) for path in wanted if Path(path).exists()}
    readable = sorted(set(real.values()))
    return {
        "readable": [
            path for path in readable if not any(_is_inside(path, other) for other in readable)
        ],
        "links": {path: target for path, target in real.items() if path != target},
        "packages": packages,
    }


def _is_inside(path: str, other: str) -> bool:
    return path != other and Path(path).is_relative_to(other)
