"""Before the first cell of a run: what cannot work is refused, what is missing is planned."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hydra.utils import instantiate

from harness.cell import Cell
from harness.launch import run_child
from harness.memory import remove_abandoned_groups
from harness.plan import FILE_NAME, write_plan
from harness.temporary import remove_abandoned
from kernels.errors import ConfigError

EXIT_REFUSED = 2


def check_cells(cells: Sequence[Cell], folder: Path, elsewhere: bool = False) -> list[str]:
    """Instantiate the methods and measures of `cells`, which may run `elsewhere`, in a child.

    Returns what should be known before they run, one sentence each.

    Raises:
        ConfigError: something cannot work; one sentence a line.
    """
    if not cells:
        return []
    path = folder / "found.json"
    job = {
        "configs": [cell.config for cell in cells],
        "found": str(path),
        "elsewhere": elsewhere,
    }
    hardware = instantiate(cells[0].config["hardware"])
    outcome = run_child("harness.check:main", job, folder, hardware, lambda text: None)
    if outcome.failure is not None:
        raise ConfigError(outcome.failure.message)
    found = json.loads(path.read_text())
    path.unlink()
    if found["problems"]:
        raise ConfigError("\n".join(found["problems"]))
    notices: list[str] = found["notices"]
    return notices


def plan_cells(cells: Sequence[Cell], folder: Path, elsewhere: bool = False) -> list[Cell]:
    """Check the cells that are missing, say what is to be known, write the plan, return them.

    Raises:
        ConfigError: as `check_cells`, or the run folder cannot be written.
    """
    try:
        return _planned(cells, folder, elsewhere)
    except OSError as error:
        where = error.filename or folder
        raise ConfigError(
            f"{where} cannot be written: {error.strerror}; runs_dir has to be a folder with room"
        ) from error


def _planned(cells: Sequence[Cell], folder: Path, elsewhere: bool) -> list[Cell]:
    there = {cell.id for cell in cells if cell.finished() and not cell.config["force"]}
    missing = [cell for cell in cells if cell.id not in there]
    for sentence in check_cells(missing, folder, elsewhere):
        print(f"note: {sentence}")
    write_plan(folder, [cell.id for cell in cells], sorted(there))
    # The plan was just written, so its time is the file system's own.
    now = (folder / FILE_NAME).stat().st_mtime
    for runs_dir in {cell.runs_dir for cell in cells}:
        remove_abandoned(runs_dir, now)
    remove_abandoned(Path(tempfile.gettempdir()), now, depth=1)
    remove_abandoned_groups()
    return missing
