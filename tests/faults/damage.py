"""Damaged files: each file that a run leaves, empty, cut in half, with bits flipped, or gone.

Several files of a finished run are damaged at once, then the same command runs again: it has to
complete, with the right values, and with the records that were not damaged as they were.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.record import FILE_NAME
from tests.faults.sweep import LIGHT, REAL, ROOT, Sweep, cheap, lasting
from tests.faults.tally import Tally

CELLS = 4
AT_ONCE = 6

Damage = Callable[[bytes, random.Random], bytes | None]


def _flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    if changed:
        place = chance.randrange(8 * len(changed))
        changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


DAMAGES: Mapping[str, Damage] = {
    "empty": lambda content, chance: b"",
    "cut in half": lambda content, chance: content[: len(content) // 2],
    "a bit flipped": _flipped,
    "another bit flipped": _flipped,
    "a third bit flipped": _flipped,
    "gone": lambda content, chance: None,
}


@dataclass
class Series:
    """Damages to the files of one finished run.

    Attributes:
        sweep: the run.
        chance: draws the order and the bits.
    """

    sweep: Sweep
    tally: Tally
    chance: random.Random

    def run(self, most: int | None) -> None:
        """Damage every file in every way, or `most` of these pairs."""
        done = self.sweep.run()
        self.tally.check_second_run(self.sweep, done)
        self.sweep.right = {record.cell: lasting(record) for record in self.sweep.records()}
        pairs = [(path, kind) for path in self._files() for kind in DAMAGES]
        self.chance.shuffle(pairs)
        while pairs[: most or len(pairs)] and (most is None or self.tally.faults < most):
            self._round(_take(pairs))

    def _files(self) -> list[Path]:
        runs = self.sweep.runs
        return sorted(p for p in runs.rglob("*") if p.is_file() and not p.is_symlink())

    def _round(self, pairs: Sequence[tuple[Path, str]]) -> None:
        before = self.sweep.finished()
        for path, kind in pairs:
            self._damage(path, kind)
            self.tally.faults += 1
            if path.name == FILE_NAME:
                before.pop(path.parent.name, None)
        names = ", ".join(f"{p.relative_to(self.sweep.runs)} {kind}" for p, kind in pairs)
        said = len(self.tally.sentences)
        self.tally.sentences += report_problems(self.sweep.runs)
        done = self.sweep.run()
        self.tally.check_records(self.sweep, before)
        self.tally.check_second_run(self.sweep, done)
        if len(self.tally.sentences) > said:
            self.tally.sentences.append(f"after {names}")

    def _damage(self, path: Path, kind: str) -> None:
        if not path.is_file():
            return  # an earlier round's run has removed it
        content = DAMAGES[kind](path.read_bytes(), self.chance)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)


def damage_cheap(folder: Path, most: int | None, seed: int) -> Tally:
    """Damage the files of cheap cells."""
    tally = Tally("a damaged file of a cheap cell")
    sweep = Sweep(folder, cheap(CELLS), {"PYTHONPATH": LIGHT})
    Series(sweep, tally, random.Random(seed)).run(most)
    sweep.remove()
    return tally


def damage_real(folder: Path, most: int | None, seed: int) -> Tally:
    """Damage the files of real cells: those of the embedded model."""
    tally = Tally("a damaged file of a real cell")
    sweep = Sweep(folder, REAL)
    Series(sweep, tally, random.Random(seed)).run(most)
    sweep.remove()
    return tally


def report_problems(runs: Path) -> list[str]:
    """Return what is wrong with a report of `runs`: it ends in sentences, never in a trace."""
    command = [sys.executable, "-m", "reports", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr:
        return [f"python -m reports ended with {done.returncode}: {done.stderr[-1500:]}"]
    return []


def _take(pairs: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Take pairs of different files off the list, at most `AT_ONCE`."""
    taken: dict[Path, str] = {}
    for path, kind in list(pairs):
        if len(taken) == AT_ONCE:
            break
        if path not in taken:
            taken[path] = kind
            pairs.remove((path, kind))
    return list(taken.items())
