"""What a series of faults comes to: counts, and a sentence for each thing that went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.faults.sweep import Done, Sweep

HEAD = (
    "| fault | faults injected | finished cells lost | wrong values read | orphan processes | "
    "temporary files left | second runs | completed |"
)


@dataclass
class Tally:
    """Counts of one kind of fault.

    Attributes:
        fault: its name in the table.
        faults: how many were injected.
        lost: finished cells whose record was not the same afterwards.
        wrong: values that were not the right ones.
        orphans: processes that outlived the run.
        left: temporary files, folders and control groups after the second run.
        second: second runs of a command, and how many of them completed with status 0.
        sentences: what went wrong, one each.
    """

    fault: str
    faults: int = 0
    lost: int = 0
    wrong: int = 0
    orphans: int = 0
    left: int = 0
    second: int = 0
    completed: int = 0
    sentences: list[str] = field(default_factory=list)

    def check_after_fault(self, sweep: Sweep, before: dict[str, bytes]) -> None:
        """Count what a fault has done to `sweep`, of which `before` was finished."""
        living = sweep.orphans()
        self.orphans += len(living)
        self.sentences += [f"{process} outlived its run" for process in living]
        self.check_records(sweep, before)

    def check_records(self, sweep: Sweep, before: dict[str, bytes]) -> None:
        """Count finished cells that are not as `before`, and values that are not right."""
        after = sweep.finished()
        lost = [cell for cell, content in before.items() if after.get(cell) != content]
        self.lost += len(lost)
        self.sentences += [f"{cell} was finished, and is not as it was" for cell in lost]
        wrong = sweep.wrong_values()
        self.wrong += len(wrong)
        self.sentences += wrong

    def check_second_run(self, sweep: Sweep, done: Done) -> None:
        """Count how a run without faults ended, and what it left behind."""
        self.second += 1
        if done.code == 0:
            self.completed += 1
        else:
            self.sentences.append(
                f"a second run ended with {done.code}: {(done.err or done.out)[-800:]}"
            )
        left = sweep.leftovers()
        self.left += len(left)
        self.sentences += [f"{path} is left" for path in left]

    @property
    def row(self) -> str:
        """The counts as a line of the table."""
        cells = [
            self.fault, self.faults, self.lost, self.wrong, self.orphans, self.left, self.second,
            self.completed,
        ]  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


def table(tallies: Sequence[Tally]) -> str:
    """Return the table of several kinds of faults."""
    rule = "|---|" + "---:|" * (HEAD.count("|") - 2)
    return "\n".join([HEAD, rule, *(tally.row for tally in tallies)])
