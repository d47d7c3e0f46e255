"""A device of this machine, held alone while something is timed and shared while nothing is.

Two files a device in /tmp, or where QUANTBENCH_LOCKS says, both locked with flock(2), which the
kernel lets go of when their holder ends: the device's own lock, shared or exclusive, and a
turnstile that whoever wants the device goes through, so that one who waits for it alone is not
passed for ever by those who share it. Each entry adds a byte to the turnstile, whose length thus
tells whether anybody else has been there meanwhile. All run folders and all users of a machine
share these files; a container or a job with a /tmp of its own is a machine of its own here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "QUANTBENCH_LOCKS"
"""Names another folder for the locks: one that containers of a machine share, or a test's own."""
FOLDER = "/tmp"  # nosec B108  # TMPDIR differs between users and children
POLL_SECONDS = 0.05
WAITING = "waiting"
"""How the stage of a child begins that waits for a device; its time limit does not run then."""


@dataclass(frozen=True)
class Device:
    """One device by its name on this machine: `cpu`, `cuda-0`, ..."""

    name: str

    @contextmanager
    def alone(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the device so that nobody else works on it; `waiting` is told if that takes time."""
        with self._entered(fcntl.LOCK_EX, waiting):
            yield

    @contextmanager
    def shared(self, waiting: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
        """Work on the device beside others that time nothing.

        Yields what tells, at any moment, whether this has been the only one on it so far.
        """
        with self._entered(fcntl.LOCK_SH, waiting) as alone:
            yield alone

    @contextmanager
    def _entered(self, mode: int, waiting: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
        said = False

        def lock(descriptor: int, wanted: int) -> None:
            nonlocal said
            while not _try_lock(descriptor, wanted):
                if not said:
                    waiting(f"{WAITING} for {self.name}, on which other cells run")
                    said = True
                time.sleep(POLL_SECONDS)

        turnstile, device = self._open("turnstile"), self._open("lock")
        try:
            lock(turnstile, fcntl.LOCK_EX)
            # Nobody else can come in here, so a lock that is free for one alone stays so.
            single = _try_lock(device, fcntl.LOCK_EX)
            lock(device, mode)
            with suppress(OSError):
                os.utime(device)  # /tmp is cleaned of what nobody has touched for days
            entries = _add_entry(turnstile)
            fcntl.flock(turnstile, fcntl.LOCK_UN)
            yield lambda: single and entries is not None and _entries(turnstile) == entries
        finally:
            # Let go of, not closed alone: a process forked from this one may have them open still.
            for descriptor in (turnstile, device):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)

    def _open(self, role: str) -> int:
        """Open a file of the device, made where it is missing, so that every user can lock it."""
        folder = os.environ.get(VARIABLE) or FOLDER
        path = Path(folder) / f"quantbench-{self.name}.{role}"
        # Neither a link nor a pipe of somebody else's is followed or waited for.
        flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        # Not made and opened in one: that is refused where another user's file is there already.
        for _ in range(10):
            try:
                return _regular(os.open(path, os.O_RDWR | os.O_APPEND | flags), path)
            except FileNotFoundError:
                with suppress(FileExistsError):
                    made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o666)
                    # Whatever the umask says: all users share a device's lock.
                    os.fchmod(made, 0o666)  # nosec B103
                    os.close(made)
            except PermissionError:
                return _regular(os.open(path, os.O_RDONLY | flags), path)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))


def device_of(device: str) -> Device:
    """Return the device that this process works on with `hardware.device`, cpu or cuda."""
    if device == "cpu":
        return Device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    first = visible.partition(",")[0].strip() or "0"
    return Device(f"{device}-{re.sub(r'[^A-Za-z0-9]+', '_', first)}")


def _regular(descriptor: int, path: Path) -> int:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def _try_lock(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _add_entry(turnstile: int) -> int | None:
    """Count an entry and return how many there are now; None where it could not be counted."""
    try:
        os.write(turnstile, b".")
    except OSError:
        return None
    return _entries(turnstile)


def _entries(turnstile: int) -> int:
    return os.fstat(turnstile).st_size
