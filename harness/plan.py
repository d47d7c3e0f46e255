"""Which cells one call of `run.py` consists of: a file that jobs and the closing report share.

Standard library only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from harness import json_file as check
from harness.record import write_atomically

FILE_NAME = "plan.json"


class PlanError(ValueError):
    """A plan that cannot be trusted: unreadable or damaged."""


@dataclass(frozen=True)
class Plan:
    """The cells of a run, in order.

    Attributes:
        started: seconds since the epoch.
        cells: ids of all cells.
        finished_before: ids of those that were there when the run began.
        deferred: ids of those that another sweep was running when their turn came.
    """

    started: float
    cells: tuple[str, ...]
    finished_before: tuple[str, ...]
    deferred: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """The cells this run had to do, in order."""
        before = set(self.finished_before)
        return tuple(cell for cell in self.cells if cell not in before)


def write_plan(folder: Path, cells: Sequence[str], finished_before: Sequence[str]) -> None:
    """Write the plan of a run that starts now into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, Plan(time.time(), tuple(cells), tuple(finished_before)))


def read_plan(folder: Path) -> Plan:
    """Read the plan in `folder`.

    Raises:
        FileNotFoundError: there is none.
        PlanError: it is damaged, or names a cell that is no folder of a run; the sentence says so.
    """
    path = folder / FILE_NAME
    try:
        facts = check.read_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} is not a plan: {error}") from error
    wrong = check.misfit(facts, _PLAN, {})
    if wrong is not None:
        raise PlanError(f"{path} is not a plan: it {wrong}")
    return Plan(facts["started"], *(tuple(facts[key]) for key in _IDS))


_IDS = ("cells", "finished_before", "deferred")
_PLAN: dict[str, check.Check] = {
    "started": check.number,
    **dict.fromkeys(_IDS, check.list_of(check.plain_name)),
}


def extend_plan(folder: Path, cells: Sequence[str], finished_before: Sequence[str] = ()) -> None:
    """Put further cells behind those planned in `folder`; the run keeps its start."""
    plan = read_plan(folder)
    longer = replace(
        plan,
        cells=tuple(dict.fromkeys([*plan.cells, *cells])),
        finished_before=tuple(dict.fromkeys([*plan.finished_before, *finished_before])),
    )
    _write(folder, longer)


def defer(folder: Path, cells: Sequence[str]) -> None:
    """Say that the next turn of `cells`, which others are running, waits for those."""
    _write(folder, replace(read_plan(folder), deferred=tuple(cells)))


def _write(folder: Path, plan: Plan) -> None:
    write_atomically(folder / FILE_NAME, json.dumps(asdict(plan), indent=1).encode())
