"""Which cells one call of `run.py` consists of: a file that jobs and the closing report share.

Standard library only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from harness.record import write_atomically

FILE_NAME = "plan.json"


@dataclass(frozen=True)
class Plan:
    """The cells of a run, in order.

    Attributes:
        started: seconds since the epoch.
        cells: ids of all cells.
        finished_before: ids of those that were there when the run began.
    """

    started: float
    cells: tuple[str, ...]
    finished_before: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """The cells this run had to do, in order."""
        return tuple(cell for cell in self.cells if cell not in self.finished_before)


def write_plan(folder: Path, cells: Sequence[str], finished_before: Sequence[str]) -> None:
    """Write the plan of a run that starts now into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(time.time(), tuple(cells), tuple(finished_before))
    write_atomically(folder / FILE_NAME, json.dumps(asdict(plan), indent=1).encode())


def read_plan(folder: Path) -> Plan:
    """Read the plan in `folder`; raises FileNotFoundError where there is none."""
    facts = json.loads((folder / FILE_NAME).read_text())
    return Plan(facts["started"], tuple(facts["cells"]), tuple(facts["finished_before"]))


def extend_plan(folder: Path, cells: Sequence[str], finished_before: Sequence[str] = ()) -> None:
    """Put further cells behind those planned in `folder`; the run keeps its start."""
    plan = read_plan(folder)
    longer = replace(
        plan,
        cells=tuple(dict.fromkeys([*plan.cells, *cells])),
        finished_before=tuple(dict.fromkeys([*plan.finished_before, *finished_before])),
    )
    write_atomically(folder / FILE_NAME, json.dumps(asdict(longer), indent=1).encode())
