"""What a user sees while cells run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ended_line(title: str, number: int, total: int, result: str, seconds: float) -> str:
    """Return the line of a cell that ended as the `number`-th of `total`, after `seconds` of all.

    For cells that run somewhere else, several at once, and show their stages there.
    """
    return f"{_place(number, total)} {title}: {result}{_left(number, total, seconds)}"


def _place(number: int, total: int) -> str:
    return f"[{number:{len(str(total))}d}/{total}]"


def _left(done: int, total: int, elapsed: float) -> str:
    remaining = total - done
    if not done or not remaining:
        return ""
    return f", about {format_seconds(elapsed / done * remaining)} left"


class CellProgress:
    """Shows one cell of a sweep: its number, its stage and the time left for the rest.

    Args:
        title: the cell as a user names it.
        number: its place in the sweep, from 1.
        total: cells in the sweep.
        elapsed_before: seconds that the sweep has run before this cell.
        stream: where to write; a bar is drawn only on a terminal.
    """

    def __init__(
        self,
        title: str,
        number: int,
        total: int,
        elapsed_before: float,
        stream: TextIO | None = None,
    ) -> None:
        self.title, self.number, self.total = title, number, total
        # The clock of the wall may have been set back since the run began.
        self.elapsed_before = max(0.0, elapsed_before)
        self.stream = stream or sys.stdout
        self.start = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> CellProgress:
        if self.stream.isatty():
            self.bar = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=Console(file=self.stream),
                transient=True,
            )
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.number - 1)
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def stage(self, text: str) -> None:
        """Show what the cell is doing now."""
        if self.bar is not None:
            left = self._left(self.number - 1)
            self.bar.update(self.task, description=f"{self.title}: {text}{left}")
        else:
            self._print(f"{self._place()} {self.title}: {text}")

    def finish(self, result: str) -> None:
        """Say how the cell ended."""
        seconds = format_seconds(time.monotonic() - self.start)
        self._print(f"{self._place()} {self.title}: {result} ({seconds}){self._left(self.number)}")

    def _place(self) -> str:
        return _place(self.number, self.total)

    def _left(self, done: int) -> str:
        return _left(done, self.total, self.elapsed_before + time.monotonic() - self.start)

    def _print(self, line: str) -> None:
        console = self.bar.console if self.bar is not None else None
        if console is not None:
            console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)
