"""A disk that is full at one write after the other, and one that is read only.

A small file system in memory, which root alone can mount.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.faults.sweep import LIGHT, REAL, Done, Sweep, cheap, undisturbed
from tests.faults.tally import Tally

DISK_BYTES = 64 << 20
CELLS = 4
PAGE = 4096
MOST_PAGES = 70
"""A cheap cell and what is written before it need less."""


class NoDiskError(Exception):
    """No file system can be mounted here."""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of `DISK_BYTES` at `folder`.

    Raises:
        NoDiskError: that is root's alone, or this machine lets nobody.
    """
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        raise NoDiskError("a small file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def leave(disk: Path, free: int) -> None:
    """Fill `disk` so that `free` bytes are left."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - free)))


def fill_disks(folder: Path, pages: Sequence[int], real: bool = False) -> Tally:
    """Run cheap or `real` cells with one number of free pages after the other, then with enough."""
    tally = Tally(f"the disk full at a write{', real cells' if real else ''}")
    right = undisturbed(folder / "undisturbed", REAL) if real else {}
    with small_disk(folder / "disk") as disk:
        sweep = Sweep(disk, cheap(CELLS), {"PYTHONPATH": LIGHT}, outputs=folder)
        if real:
            sweep = Sweep(disk, REAL, outputs=folder, right=right)
        for number in sorted(pages):
            before = sweep.finished()
            leave(disk, number * PAGE)
            done = sweep.run()
            tally.faults += 1
            tally.check_after_fault(sweep, before)
            tally.sentences += _unclear(done, "No space left on device", f"{number} pages free")
        before = sweep.finished()
        (disk / "filler").unlink()
        done = sweep.run()
        tally.check_records(sweep, before)
        tally.check_second_run(sweep, done)
        sweep.remove()
    return tally


def read_only(folder: Path) -> Tally:
    """Run on a disk that is read only, first an empty one, then one with finished cells."""
    tally = Tally("a read-only run folder")
    with small_disk(folder / "disk") as disk:
        sweep = Sweep(disk, cheap(CELLS), {"PYTHONPATH": LIGHT}, outputs=folder)
        for arguments in (cheap(2), cheap(CELLS), ["suite=smoke"]):
            before = sweep.finished()
            sweep.arguments = arguments
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            done = sweep.run()
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            tally.faults += 1
            tally.check_after_fault(sweep, before)
            tally.sentences += _unclear(done, "Read-only file system", " ".join(arguments))
            if arguments == cheap(2):
                tally.check_second_run(sweep, sweep.run())
        before = sweep.finished()
        sweep.arguments = cheap(CELLS)
        done = sweep.run()
        tally.check_records(sweep, before)
        tally.check_second_run(sweep, done)
        sweep.remove()
    return tally


def _unclear(done: Done, reason: str, when: str) -> list[str]:
    """Return what is wrong with what a run said that could not write."""
    said = done.out + done.err
    if done.code == 0 or reason not in said or "Traceback" in said:
        return [f"{when}: status {done.code}, said {said[-1500:]!r}"]
    return []
