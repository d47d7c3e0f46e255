"""One worker at a time for one piece of work, also between two sweeps on one folder.

A claim is an advisory lock on a file that names its holder. The kernel lets go of it when the
holder ends in whatever way, so a killed sweep leaves nothing to clean up and no clock is read.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.2


@contextmanager
def claim(path: Path, waiting: Callable[[str], None]) -> Iterator[bool]:
    """Hold the claim at `path` while the block runs; yields whether it had to be waited for.

    `waiting` is called once, with a description of the holder, where somebody else holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        waited = False
        while not _try_lock(descriptor):
            if not waited:
                waiting(_holder(path))
                waited = True
            time.sleep(POLL_SECONDS)
        owner = json.dumps({"host": platform.node(), "pid": os.getpid()}).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner, 0)
        yield waited
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
