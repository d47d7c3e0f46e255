"""What a sweeper that looks for its own points is told of each: figures of the cell's record.

Such a sweeper (Optuna's) has no plan beforehand: each point is checked and planned when it comes.
Torch-free.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.cell import Cell
from harness.claim import claim
from harness.plan import FILE_NAME, extend_plan, read_plan
from harness.record import Record, read_record
from harness.sweep import check_cells, plan_cells
from kernels.errors import ConfigError

FAILED = "failed"
"""What a sweeper is told of a trial without figures: not a number, so it counts as failed."""


def run_trial(
    cell: Cell, folder: Path, objectives: Sequence[str], run: Callable[[Cell, Path], str]
) -> str | tuple[float, ...]:
    """Plan `cell` behind what `folder` has planned, `run` it, and return its `objectives`.

    A point that cannot work, or whose cell fails, is a failed trial and not the end of the search.

    Raises:
        ConfigError: the first cell lacks an objective, so all may.
    """
    try:
        _join(cell, folder)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"trial refused: {cell.title}: {line}", file=sys.stderr)
        return FAILED
    if run(cell, folder) == FAILED:
        return FAILED
    record = read_record(cell.folder)
    try:
        values = tuple(objective(record, wanted) for wanted in objectives)
    except ConfigError as error:
        if len(read_plan(folder).cells) == 1:
            raise
        print(f"trial failed: {cell.title}: {error}", file=sys.stderr)
        return FAILED
    return values if all(map(math.isfinite, values)) else FAILED


def _join(cell: Cell, folder: Path) -> None:
    """Check `cell` and put it into the plan; trials may run beside each other.

    Raises:
        ConfigError: it cannot work.
    """
    with claim(folder / "plan.claim", lambda holder: None):
        if not (folder / FILE_NAME).exists():
            plan_cells([cell], folder)
            return
        there = cell.finished() and not cell.config["force"]
        if cell.id not in read_plan(folder).cells:
            check_cells([] if there else [cell], folder)
            extend_plan(folder, [cell.id], [cell.id] if there else [])


def objective(record: Record, wanted: str) -> float:
    """Return the value of `wanted`, `metric` or `metric/protocol`, in `record`.

    Raises:
        ConfigError: the record has no such value, or several.
    """
    metric, _, protocol = wanted.partition("/")
    found = [v for v in record.values if v.metric == metric and protocol in ("", v.protocol)]
    if len(found) == 1:
        return found[0].value
    if found:
        shown = ", ".join(f"{value.metric}/{value.protocol}" for value in found)
        raise ConfigError(f"job.objectives names {wanted!r}, of which there are several: {shown}")
    known = ", ".join(sorted({value.metric for value in record.values}))
    raise ConfigError(
        f"job.objectives names {wanted!r}, which {record.cell} does not have; it has {known}"
    )
