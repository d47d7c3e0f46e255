"""Memory of a process: what it takes, its peak, and a limit that is really enforced.

The limit is a control group where one can be made (version 2 or 1 of the interface), else the
parent watches resident memory. There is no limit on address space: CUDA reserves far more than it
uses. Pages inherited from the fork server belong to the server in either way of counting.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.owner import parse_owner, this_process

CGROUPS = Path("/sys/fs/cgroup")
PREFIX = "quantbench-"
REMOVALS = 20
REMOVAL_SECONDS = 0.05
"""A process that was killed leaves its group a moment later."""


def resident_bytes(pid: int) -> int:
    """Return the resident memory of process `pid`, 0 where it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def over_limit(pid: int, start_bytes: int, limit_bytes: int) -> bool:
    """Whether `pid` and its descendants take over `limit_bytes` more than `start_bytes`."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return False
    return sum(resident_bytes(member.pid) for member in family) - start_bytes > limit_bytes


def reset_peak() -> int:
    """Set this process's peak of resident memory to what it takes now, and return that.

    Where /proc/self/clear_refs is not writable (some containers) the peak of a forked child starts
    at what it inherited, which is the same number.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes(os.getpid())


def peak_bytes() -> int:
    """Return the peak of resident memory of this process since `reset_peak` (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line")


@dataclass(frozen=True)
class MemoryGroup:
    """A control group of one child with a memory limit."""

    folder: Path
    version: int

    @classmethod
    def create(cls, limit_bytes: int) -> MemoryGroup | None:
        """Make a group below this process's own; None where the system does not let us."""
        remove_abandoned_groups()
        for version, parent in group_parents():
            folder = parent / f"{PREFIX}{this_process().token}-{secrets.token_hex(4)}"
            limit = folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")
            try:
                folder.mkdir()
                limit.write_text(str(limit_bytes))
            except OSError:
                _remove(folder)
                continue
            return cls(folder, version)
        return None

    @property
    def join_path(self) -> str:
        """File to which a process writes its number to join."""
        return str(self.folder / "cgroup.procs")

    def killed_for_memory(self) -> bool:
        """Whether the kernel killed a process of the group for its memory."""
        file = "memory.events" if self.version == 2 else "memory.oom_control"
        try:
            lines = (self.folder / file).read_text().splitlines()
        except OSError:
            return False
        counts = dict(line.split() for line in lines)
        return int(counts.get("oom_kill", 0)) > 0

    def remove(self) -> None:
        """Remove the group; its processes have ended."""
        for _ in range(REMOVALS):
            if _remove(self.folder):
                return
            time.sleep(REMOVAL_SECONDS)


def remove_abandoned_groups() -> list[Path]:
    """Remove the groups of drivers that have ended, and return them."""
    removed = []
    for _, parent in group_parents():
        for folder in parent.glob(f"{PREFIX}*"):
            owner = parse_owner(folder.name)
            if owner is not None and owner.ended() and _remove(folder):
                removed.append(folder)
    return removed


def _remove(folder: Path) -> bool:
    """Remove a group; False where it still has processes."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def group_parents() -> list[tuple[int, Path]]:
    """Return (version, folder) of this process's own groups that can limit memory."""
    found: list[tuple[int, Path]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" and (CGROUPS / "cgroup.controllers").exists():
            folder = CGROUPS / path.lstrip("/")
            if "memory" in (folder / "cgroup.subtree_control").read_text().split():
                found.append((2, folder))
        elif "memory" in controllers.split(","):
            found.append((1, CGROUPS / "memory" / path.lstrip("/")))
    return [(version, folder) for version, folder in found if folder.is_dir()]
