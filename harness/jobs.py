"""What `run.py` does with one composed configuration (`conf/job/`)."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from harness.cell import Cell, run_cell
from harness.objectives import run_trial
from harness.plan import read_plan
from harness.planning import plan_cell
from harness.progress import CellProgress
from harness.sweep import EXIT_REFUSED, plan_cells
from kernels.errors import ConfigError


@dataclass(frozen=True)
class CellJob:
    """Quantize, load, measure: one row of the table.

    Attributes:
        child: another job of one child process (`module:function`), whose record is no row.
        options: what that child reads in its configuration, under `job.options`.
        objectives: metrics that a sweeper is told, as `metric` or `metric/protocol`.
    """

    name: str
    child: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    objectives: Sequence[str] = ()

    def run(self, config: DictConfig) -> str | tuple[float, ...]:
        """Run the cell of `config`; alone, also the baseline's cell that it is compared with.

        Returns how it ended, or the values of the objectives where there are some.
        """
        hydra = HydraConfig.get()
        overrides = list(hydra.overrides.task)
        try:
            cell = plan_cell(config, overrides)
            if hydra.mode == RunMode.MULTIRUN:
                folder = Path(hydra.sweep.dir).absolute()
                if self.objectives:
                    return run_trial(cell, folder, self.objectives, run_planned)
                # Others' cells are left for later, when nothing else is to be done.
                return run_planned(cell, folder, defers=True)
            folder = Path(hydra.run.dir).absolute()
            cells = [cell]
            # A quantized checkpoint without its original has nothing to be compared with.
            if cell.has_reference and cell.child is None:
                baseline = baseline_cell(config, overrides)
                cells = [baseline, cell] if baseline.id != cell.id else cells
            plan_cells(cells, folder)
        except ConfigError as error:
            refuse(error)
        return [run_planned(each, folder) for each in cells][-1]


def refuse(error: ConfigError) -> NoReturn:
    """Say what cannot work, a line a sentence, and end."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(EXIT_REFUSED) from None


def baseline_cell(config: DictConfig, overrides: list[str]) -> Cell:
    """Return the cell with the baseline's method in the place of the cell's own."""
    changed = config.copy()
    with open_dict(changed):
        changed.method = changed.baseline
        changed.force = False
    kept = [o for o in overrides if not o.startswith(("method=", "method.", "force="))]
    kept = [o for o in kept if not o.startswith(("bits=", "group_size="))]
    if any(o.startswith("profile=") for o in kept):
        # A profile has options of its method's; of the rest, the hardware counts for the baseline.
        kept = [o for o in kept if not o.startswith(("profile=", "hardware="))]
        kept.append(f"hardware={config.hardware.name}")
    return plan_cell(changed, [*kept, f"method={config.baseline.name}"])


def run_planned(cell: Cell, folder: Path, defers: bool = False) -> str:
    """Run `cell` as the next of the plan in `folder`, with its progress shown.

    Where another sweep runs it, wait for that; or, the first time that a sweep which `defers` comes
    to it, return `elsewhere`.
    """
    plan = read_plan(folder)
    if cell.id not in plan.cells:
        print(
            f"error: {cell.title} is not the cell that was planned: the code, a model or a text "
            "changed while the sweep ran; run the command again",
            file=sys.stderr,
        )
        return "failed"
    if cell.id not in plan.missing:
        return "there"
    number = plan.missing.index(cell.id) + 1
    elapsed = time.time() - plan.started
    with CellProgress(cell.title, number, len(plan.missing), elapsed) as progress:
        try:
            result = run_cell(cell, progress.stage, not defers or cell.id in plan.deferred)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            progress.finish(f"failed: {error.strerror or error}{where}")
            return "failed"
        progress.finish(result)
    return result
