"""`python -m reports track RUNS_DIR --project NAME`: the rows of a report as runs of wandb.

One run of Weights & Biases a cell: its configuration is the axes and the method's options, its
summary the values, each as `metric/protocol`, so that two protocols share no column there either.
Nothing is sent unless `--online` is given: the runs lie in `RUNS_DIR/wandb/`, and `wandb sync`
sends them. A run's id follows from its cell's: what has changed takes the place of what was written
before, what has not is left alone.

All that a run holds is in `Run`: no environment variable, no source, no command line of this
process and no list of packages goes along. wandb is an extra of this project, `tracking`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.record import digest, write_atomically
from reports.gather import make_rows
from reports.render import ReportError, read_runs
from reports.rows import Row, mapping

EXIT_REFUSED = 2
FOLDER = "wandb"
"""The name that wandb gives the folder of its runs."""
MARKER = "quantbench.json"
"""What was written into a run, as a digest: beside wandb's own files."""
ID_LENGTH = 24
MOST_OF_TAG = 64
"""Characters that wandb allows in a tag."""
AXES = ("model", "method", "bits", "group_size", "hardware", "suite", "data", "baseline")
LEFT_OUT = frozenset(("_target_", "name", *AXES))
"""Options of a method that stand among the axes."""
IDENTITIES = ("cell_key", "artefact_key", "command")
MACHINE = ("cpu", "gpu", "threads")


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a cell.

    Attributes:
        project, entity: where the run belongs; None is the user's own entity.
        id: follows from these and the cell; the same in every call.
        name: the row's label in the report.
        group: what rows are compared within: model and hardware.
        config: axes, identities and options; plain values.
        summary: `metric/protocol` -> value, and `metric_stderr/protocol` where there is one.
        failed: whether the cell failed.
        host: the machine that ran the cell.
    """

    project: str
    entity: str | None
    id: str
    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: dict[str, Any]
    summary: dict[str, float]
    failed: bool
    host: str


def make_runs(rows: Sequence[Row], project: str, entity: str | None = None) -> list[Run]:
    """Return a run for each of `rows`, which are single cells."""
    return [_run(row, project, entity) for row in rows]


def track(
    runs_dir: Path, project: str, entity: str | None = None, online: bool = False
) -> tuple[int, int]:
    """Write the rows of `runs_dir` into runs of wandb; returns how many, and how many were there.

    Raises:
        ReportError: there are no rows, wandb is not installed, or it refuses; one sentence.
        OSError: a file could not be written.
    """
    records, problems = read_runs(runs_dir)
    runs = make_runs(make_rows(records, "none"), project, entity)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not runs:
        raise ReportError(f"{runs_dir} has no record of a cell, so there is nothing to track")
    marks = {run.id: digest([asdict(run), online]) for run in runs}
    new = [run for run in runs if not _is_there(runs_dir, run, marks[run.id])]
    if not new:
        return 0, len(runs)
    if find_spec("wandb") is None:
        raise ReportError(
            "a tracker needs the package wandb, which is not installed here; install it: "
            "python -m pip install --constraint constraints.txt '.[tracking]'"
        )
    if not os.access(runs_dir, os.R_OK | os.W_OK):
        # wandb would write into a temporary folder instead.
        raise ReportError(f"{runs_dir} cannot be written to, and the tracker's runs go into it")
    wandb = import_module("wandb")
    try:
        for run in new:
            _remove_unsent(runs_dir, run)
            folder = _write(wandb, runs_dir, run, online)
            mark = json.dumps({"digest": marks[run.id]})
            write_atomically(folder / MARKER, mark.encode())
            print(f"  {run.group}: {run.name}", flush=True)
    except wandb.Error as error:
        raise ReportError(f"wandb: {' '.join(str(error).split())}") from error
    finally:
        # Its service is a process of its own.
        wandb.teardown()
    return len(new), len(runs) - len(new)


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; returns the exit status, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        written, there = track(options.runs_dir, options.project, options.entity, options.online)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    folder = options.runs_dir / FOLDER
    print(f"{written + there} cells: {written} written, {there} there already, in {folder}")
    if not options.online:
        print(f"nothing was sent; to send: wandb sync {folder}/offline-run-*")
    return 0


def _run(row: Row, project: str, entity: str | None) -> Run:
    record, config = row.record, row.record.config
    options = {
        f"method.{key}": value
        for key, value in mapping(mapping(config.get("resolved")).get("method")).items()
        if key not in LEFT_OUT and isinstance(value, str | int | float)
    }
    named = {key: config.get(key) for key in (*AXES, *IDENTITIES)}
    named["seed"] = mapping(config.get("resolved")).get("seed")
    named.update({key: record.environment.get(key) for key in MACHINE})
    state = {"cell": record.cell, "status": record.status, "execution": row.execution}
    summary: dict[str, float] = {}
    for (metric, protocol), value in row.values.items():
        summary[f"{metric}/{protocol}"] = value.value
        if value.stderr is not None:
            summary[f"{metric}_stderr/{protocol}"] = value.stderr
    tags = [row.model, row.method, row.hardware, record.status]
    return Run(
        project=project,
        entity=entity,
        id=digest([project, entity, record.cell])[:ID_LENGTH],
        name=row.label,
        group=f"{row.model} on {row.hardware}",
        job_type=str(config.get("suite")),
        tags=tuple(dict.fromkeys(str(tag)[:MOST_OF_TAG] for tag in tags if tag)),
        config={**named, **options, **state, "started": record.started, "seconds": record.seconds},
        summary=summary,
        failed=record.status == "failed",
        host=str(record.environment.get("host", "")),
    )


def _folders(runs_dir: Path, run: Run) -> list[Path]:
    """Return the folders of earlier runs of this id, sent or not."""
    found = (runs_dir / FOLDER).glob(f"*run-*-{run.id}")
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _is_there(runs_dir: Path, run: Run, mark: str) -> bool:
    for folder in _folders(runs_dir, run):
        try:
            if json.loads((folder / MARKER).read_text())["digest"] == mark:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False


def _remove_unsent(runs_dir: Path, run: Run) -> None:
    """Remove what an earlier call wrote of this cell and nobody has sent: it is out of date."""
    for folder in _folders(runs_dir, run):
        if folder.name.startswith("offline-") and not any(folder.glob("*.synced")):
            shutil.rmtree(folder)


def _write(wandb: Any, runs_dir: Path, run: Run, online: bool) -> Path:
    """Write `run` and return the folder that wandb made for it."""
    settings = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        host=run.host,
        save_code=False,
        silent=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    begun = wandb.init(
        mode="online" if online else "offline",
        dir=str(runs_dir),
        project=run.project,
        entity=run.entity,
        id=run.id,
        resume="allow" if online else None,
        name=run.name,
        group=run.group,
        job_type=run.job_type,
        tags=list(run.tags),
        config=run.config,
        settings=settings,
    )
    begun.summary.update(run.summary)
    folder = Path(begun.dir).parent
    begun.finish(exit_code=1 if run.failed else 0)
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports track",
        description="Write each row of a report as a run of Weights & Biases: axes as its "
        "configuration, values as its summary. A second call writes what has changed.",
        epilog="Exit status: 0 done, 2 the command cannot be carried out.",
    )
    parser.add_argument("runs_dir", metavar="RUNS_DIR", type=Path, help="runs_dir of the sweeps")
    parser.add_argument("--project", required=True, metavar="NAME", help="the project of the runs")
    parser.add_argument("--entity", metavar="NAME", help="user or team the project belongs to")
    parser.add_argument(
        "--online",
        action="store_true",
        help="send the runs, with the login that wandb has; without it nothing is sent",
    )
    return parser
