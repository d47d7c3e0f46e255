"""Who a process is, so that others can tell whether it still lives. Standard library only.

A process number alone says nothing: it is given again after a while, differs between containers,
and another machine has its own. So an owner is a boot of a machine (with its name and the PID
namespace), a process number in it, and the moment that process began.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROC = Path("/proc")
STATE, SESSION, START = 0, 3, 19
"""Places of `state`, `session` and `starttime` in what `process_facts` returns (proc(5))."""
TOKEN = re.compile(r"\b([0-9a-f]{12})-(\d+)-(\d+)\b")


@dataclass(frozen=True)
class Owner:
    """One process of any machine.

    Attributes:
        machine: digest of the boot, the machine's name and the PID namespace.
        pid: the process in that namespace.
        start: when it began, in clock ticks since that boot.
    """

    machine: str
    pid: int
    start: int

    @property
    def token(self) -> str:
        """The owner as part of a file's name or content."""
        return f"{self.machine}-{self.pid}-{self.start}"

    def ended(self) -> bool:
        """Whether the process is known to have ended; False where that cannot be known here."""
        if self.machine != _machine():
            return False
        try:
            facts = process_facts(self.pid)
        except OSError:
            return not _answers(self.pid)
        return has_ended(facts) or int(facts[START]) != self.start


def this_process() -> Owner:
    """Return the process that calls."""
    pid = os.getpid()
    return Owner(_machine(), pid, int(process_facts(pid)[START]))


def parse_owner(text: str) -> Owner | None:
    """Return the owner whose token stands in `text`; None where there is none."""
    found = TOKEN.search(text)
    if found is None:
        return None
    machine, pid, start = found.groups()
    return Owner(machine, int(pid), int(start))


def process_facts(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the command's name.

    Raises:
        OSError: there is no such process, or it is hidden.
    """
    # The name is in brackets and may hold anything: brackets, blanks, bytes that are no UTF-8.
    return (PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].decode().split()


def has_ended(facts: Sequence[str]) -> bool:
    """Whether the process of these facts has ended, though nobody may have asked for it yet."""
    return facts[STATE] in "ZX"


def _answers(pid: int) -> bool:
    """Whether there is a process `pid`, which /proc may hide from other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@cache
def _machine() -> str:
    boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    namespace = (PROC / "self/ns/pid").readlink()
    # Copies of a virtual machine that were made while it ran share the boot, not the name.
    return hashlib.sha256(f"{boot} {platform.node()} {namespace}".encode()).hexdigest()[:12]
