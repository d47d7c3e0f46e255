"""One worker at a time for one piece of work, also between machines that share a folder.

The claims on a piece of work are files `<name>.1`, `<name>.2`, ...; the last one counts. Each is
created exclusively (O_CREAT with O_EXCL, atomic on local file systems and on NFS since version 3),
names its owner, and is touched by it every few seconds while it is held. A claim is free once

- it was released (its time of change is the epoch), or
- its owner is a process of this machine that has ended, or
- it has not been touched for a while.

Whoever finds the last claim free takes the work over by creating the next one: of several only one
can. No claim is ever removed or given a second owner, so nobody, however late, can take a claim for
free that somebody has taken over meanwhile. An owner that stood still for so long that others took
over is told by `Held.lost`. What that rests on stands in docs/scaling.md.

No clocks are compared: a heartbeat is a change of the file's time, whatever the time says, and how
long there was none is counted by the watcher's own monotonic clock. Locks of the kernel would need
no heartbeat, but not every shared file system has them between machines. Standard library only.
"""

from __future__ import annotations

import errno
import os
import platform
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from harness.owner import Owner, parse_owner, this_process

MOST_BYTES = 300
"""No claim is longer: a token, and a host name of at most 64 bytes."""


@dataclass(frozen=True)
class Pace:
    """How often claims are touched and looked at, in seconds.

    Attributes:
        beat: between two heartbeats of an owner.
        abandoned: without a heartbeat, until others take over.
        poll: first wait of a watcher; each further one is half as long again, up to `longest_poll`.
    """

    beat: float = 10.0
    abandoned: float = 60.0
    poll: float = 0.05
    longest_poll: float = 2.0


PACE = Pace()


class TakenOverError(RuntimeError):
    """Somebody else does the work now, since this process stood still for too long."""


@dataclass(frozen=True)
class Held:
    """A claim of this process.

    Attributes:
        path: its file.
        waited: whether somebody else had to be waited for.
    """

    path: Path
    waited: bool

    def lost(self) -> bool:
        """Whether the work is no longer this process's to do, as `superseded` says."""
        return superseded(self.path)

    def release(self) -> None:
        """Say that the work is free; needs no space on the disk."""
        with suppress(OSError):
            os.utime(self.path, ns=(0, 0))


def superseded(path: Path) -> bool:
    """Whether the claim at `path` is not the last: it was taken over, or removed with its folder.

    False where that cannot be found out now.
    """
    name, _, number = path.name.rpartition(".")
    try:
        return _last(path.with_name(name)) != int(number)
    except OSError:
        return False


@contextmanager
def still_held(path: Path) -> Iterator[Callable[[], None]]:
    """Give the last look for `write_atomically`, by which no late owner replaces others' work.

    An owner writes a temporary file, looks, and renames it. Who takes over creates the next claim,
    removes what is unfinished (`harness.temporary`), and only then looks what is done. So an owner
    that stood still between look and rename has nothing left to rename.

    Raises:
        TakenOverError: the claim at `path` was taken over before the file had its name.
    """

    def look() -> None:
        if superseded(path):
            raise TakenOverError("another sweep has taken the cell over")

    try:
        yield look
    except FileNotFoundError:
        look()
        raise


@contextmanager
def claim(
    path: Path,
    waiting: Callable[[str], None],
    until: Callable[[], bool] = lambda: False,
    pace: Pace = PACE,
) -> Iterator[Held | None]:
    """Hold the claim on `path` while the block runs.

    Args:
        path: names the work; the files of its claims stand beside it, in a folder with little else,
            as that is listed at every look.
        waiting: called once where somebody else holds it, with a description of the holder. What
            it raises comes out, for those who would rather do something else.
        until: what ends the waiting: None is yielded, and nothing is held, once it is true.
        pace: heartbeats and patience.

    Raises:
        OSError: a claim could not be written or read.
    """
    held = _take(path, waiting, until, pace)
    if held is None:
        yield None
        return
    try:
        with _beating(held.path, pace.beat):
            yield held
    finally:
        held.release()


@contextmanager
def _beating(path: Path, seconds: float) -> Iterator[None]:
    """Touch `path` every `seconds` while the block runs."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(seconds):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # A beat on its way would make the released claim look held.
        thread.join()


def _take(
    path: Path, waiting: Callable[[str], None], until: Callable[[], bool], pace: Pace
) -> Held | None:
    watch = _Watch(pace.abandoned)
    least, waited, seconds = 0, False, pace.poll
    while True:
        # A listing may be older than what a creation has said.
        number = max(_last(path), least)
        current = _numbered(path, number)
        if number == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        if number == 0 or watch.free(current):
            least = number + 1
            if (held := _create(_numbered(path, least), waited)) is not None:
                return held
            continue
        if not waited:
            waiting(_holder(current))
            waited = True
        time.sleep(seconds * random.uniform(0.5, 1.0))  # watchers drift apart
        seconds = min(1.5 * seconds, pace.longest_poll)
        if until():
            return None


@dataclass
class _Watch:
    """Looks whether the last claim is free, again and again."""

    abandoned_seconds: float
    _seen: tuple[Path, int] | None = None
    _since: float = 0.0

    def free(self, path: Path) -> bool:
        # Before the look, and below after it: this process may stand still in between.
        now = time.monotonic()
        try:
            owner, _, changed = _look(path)
        except OSError as error:
            # A listing may name what is not there, or not yet; and a server may have restarted.
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            owner, changed = None, -1
        if changed == 0 or (owner is not None and owner.ended()):
            return True
        if (path, changed) != self._seen:
            self._seen, self._since = (path, changed), time.monotonic()
            return False
        return now - self._since > self.abandoned_seconds


def _look(path: Path) -> tuple[Owner | None, str, int]:
    """Return owner, host and time of change (nanoseconds) of the claim at `path`."""
    # Opening makes a network file system ask the server what the file is like now.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        changed = os.fstat(descriptor).st_mtime_ns
        text = os.read(descriptor, MOST_BYTES).decode(errors="replace")
    finally:
        os.close(descriptor)
    # Half a token could name another process.
    owner = parse_owner(text) if text.endswith("\n") else None
    return owner, text.partition(" ")[2].strip(), changed


def _create(path: Path, waited: bool) -> Held | None:
    """Create the claim `path` for this process; None where somebody else was faster."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return None
    held = Held(path, waited)
    try:
        try:
            os.write(descriptor, f"{this_process().token} {platform.node()}\n".encode())
        finally:
            os.close(descriptor)
    except OSError:
        held.release()
        raise
    return held


def _last(path: Path) -> int:
    """Return the number of the last claim on `path`, 0 where there is none."""
    name = re.compile(re.escape(path.name) + r"\.([1-9][0-9]*)")
    try:
        # Opening the folder makes a network file system ask whether its listing still holds.
        with os.scandir(path.parent) as entries:
            found = [name.fullmatch(entry.name) for entry in entries]
    except FileNotFoundError:
        return 0
    return max((int(match.group(1)) for match in found if match), default=0)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _holder(path: Path) -> str:
    with suppress(OSError):
        owner, host, _ = _look(path)
        if owner is not None and host.isprintable():
            return f"process {owner.pid} on {host}"
    return "another process"
