"""What a child has started: found and ended with it, in whatever session or group it is.

A process is found by the session of its leader, by a mark in the environment it was started with,
or by its control group, whichever is there: one that left the session for another has the mark, and
one that was forked without a program of its own is in the session or the group. Linux, standard
library only.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.owner import PROC, SESSION, has_ended, process_facts

ROUNDS = 50
ROUND_SECONDS = 0.02


@dataclass(frozen=True)
class Family:
    """A child and everything it has started.

    Attributes:
        mark: text that stands in the environment of every program they started.
        group: file with the processes of their control group, None where they have none.
    """

    mark: str
    group: str | None

    def members(self, leader: int) -> set[int]:
        """Return the living processes of the session of `leader`, marked, or in the group.

        `leader` itself and the process that calls are not among them.
        """
        found = set(self._grouped())
        for name in filter(str.isdigit, (entry.name for entry in PROC.iterdir())):
            if _session(int(name)) == leader or self._marked(name):
                found.add(int(name))
        return {pid for pid in found - {leader, os.getpid()} if _alive(pid)}

    def end(self, leader: int) -> None:
        """Kill the members, and what they start meanwhile; gives up on what cannot be killed."""
        for _ in range(ROUNDS):
            members = self.members(leader)
            if not members:
                return
            for pid in members:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(ROUND_SECONDS)

    def _grouped(self) -> list[int]:
        if self.group is None:
            return []
        try:
            return [int(line) for line in Path(self.group).read_text().split()]
        except OSError:
            return []

    def _marked(self, pid: str) -> bool:
        try:
            return self.mark.encode() in (PROC / pid / "environ").read_bytes()
        except OSError:
            return False  # it has ended, or is another user's


def _session(pid: int) -> int | None:
    try:
        return int(process_facts(pid)[SESSION])
    except OSError:
        return None


def _alive(pid: int) -> bool:
    try:
        return not has_ended(process_facts(pid))
    except OSError:
        return False
