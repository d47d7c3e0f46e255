"""The end of a run: the summary table, the report, and the exit status.

A Hydra callback, called in the driver after the last job, whichever launcher ran the jobs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from harness.claim import claim
from harness.plan import PlanError, read_plan
from harness.record import RecordError, read_record


class Closing(Callback):
    """Prints the table of the run's cells and writes the report of its folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before a single cell."""
        _make(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before a grid."""
        _make(Path(config.hydra.sweep.dir))

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """After a single cell."""
        _close(Path(config.hydra.run.dir), Path(config.runs_dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """After a grid."""
        _close(Path(config.hydra.sweep.dir), Path(config.runs_dir))


def _make(folder: Path) -> None:
    """Make the folder of a run, which Hydra would fail to make with a trace of its own."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"error: {error.filename} cannot be made: {error.strerror}; runs_dir=FOLDER has to be "
            "a folder that can be written",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def _close(folder: Path, runs_dir: Path) -> None:
    from reports.outcomes import outcome_text, succeeded
    from reports.render import ReportError, write_report
    from reports.table import summary_text

    try:
        plan = read_plan(folder)
    except (OSError, PlanError) as error:
        # Hydra would turn it into a warning, and the status into 0.
        print(f"error: the run's plan is lost: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    records, problems = [], []
    for cell in plan.cells:
        try:
            records.append(read_record(runs_dir / cell))
        except FileNotFoundError:
            problems.append(f"{cell} has no record")
        except RecordError as error:
            problems.append(str(error))
    if text := summary_text(records):
        print(f"\n{text}")
    for outcome in filter(None, map(outcome_text, records)):
        print(f"\n{outcome}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    done = all(record.status == "ok" and succeeded(record) for record in records)
    del records  # the report reads them again, and of thousands needs the room
    try:
        # Of two sweeps that end together, the later one reads what the earlier one has left.
        with claim(runs_dir / "cache" / "report" / "claim", lambda holder: None):
            pages = write_report(runs_dir)
    except (OSError, ReportError) as error:
        print(f"error: the report could not be written: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"\nreport: {pages.html}")
    if problems or not done:
        raise SystemExit(1)
