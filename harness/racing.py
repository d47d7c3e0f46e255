"""Runs a search's candidates as cells, rung by rung, and keeps what came out as one record.

Rungs before the last are cells of job `rung`: their records are no rows, and their artefacts are
those of the last rung, since an artefact knows no suite.
"""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from harness.cell import Cell
from harness.hardware import describe
from harness.identity import KEY_LENGTH
from harness.increase import window_losses
from harness.plan import read_plan, write_plan
from harness.record import FILE_NAME, Record, digest, read_record, write_record
from harness.search import Race, Search
from kernels.errors import ConfigError

RUNG = "job.name=rung"
WINDOWS = "suite.measures.perplexity.windows"

Cells = dict[str, tuple[Cell, list[str]]]


@dataclass
class Racing:
    """One search over cells.

    Attributes:
        search: what is searched for.
        axes: key -> one override a value; those with several values tell candidates apart.
        compose: points (lists of overrides) -> their cells.
        launch: runs those of some cells that are not there.
    """

    search: Search
    axes: Mapping[str, Sequence[str]]
    compose: Callable[[list[list[str]]], Cells]
    launch: Callable[[Cells], Any]
    planned: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)

    def run(self, config: DictConfig, arguments: Sequence[str]) -> None:
        """Search, and leave the record and a plan of all cells for the closing report.

        Raises:
            ConfigError: the suite has no perplexity, a cell cannot work, or the baseline failed.
        """
        folder = Path(config.hydra.sweep.dir).absolute()
        started, begun = datetime.now(UTC), time.monotonic()
        every = [list(point) for point in itertools.product(*self.axes.values())]
        cells = self.compose(every)
        baseline = self._baseline(next(iter(cells.values())))
        if "perplexity" not in baseline[0].config["suite"]["measures"]:
            raise ConfigError(
                f"suite {baseline[0].config['suite']['name']} has no measure named perplexity, by "
                "which a search decides; pass suite=search"
            )
        candidates = [
            one for one in cells.values() if one[0].artefact_key != baseline[0].artefact_key
        ]
        if not candidates:
            raise ConfigError("the search has no candidate beside the baseline")
        points = [point for _, point in candidates]

        def evaluate(numbers: Sequence[int], windows: int | None) -> list[Record]:
            more = [] if windows is None else [RUNG, f"{WINDOWS}={windows}"]
            made = [self.compose([[*points[number], *more]]) for number in numbers]
            self._launch({key: value for one in made for key, value in one.items()}, folder)
            return [_read(cell) for one in made for cell, _ in one.values()]

        self._launch({baseline[0].id: baseline}, folder)
        losses = window_losses(_read(baseline[0]))
        if losses is None:
            raise ConfigError(f"the baseline {baseline[0].title} gave no perplexity; see {folder}")
        labels = [self._label(point) for point in points]
        details = Race(self.search, labels, losses.samples, evaluate).run()
        record = _record(
            candidates, details, baseline[0], arguments, started, time.monotonic() - begun
        )
        write_record(record, baseline[0].runs_dir / record.cell)
        write_plan(folder, list(dict.fromkeys([*self.planned, record.cell])), self.there)

    def _launch(self, cells: Cells, folder: Path) -> None:
        self.launch(cells)
        plan = read_plan(folder)
        self.planned += plan.cells
        self.there += plan.finished_before

    def _baseline(self, first: tuple[Cell, list[str]]) -> tuple[Cell, list[str]]:
        """Return the baseline's cell beside `first`: its point without what a method has."""
        cell, point = first
        mine = ("method=", "method.", "bits=", "group_size=")
        kept = [override for override in point if not override.startswith(mine)]
        name = cell.config["baseline"]["name"]
        return next(iter(self.compose([[*kept, f"method={name}"]]).values()))

    def _label(self, point: Sequence[str]) -> str:
        """Return what tells this candidate apart."""
        own = [o for values in self.axes.values() if len(values) > 1 for o in values if o in point]
        return " ".join(override.removeprefix("method.") for override in own) or point[0]


def _read(cell: Cell) -> Record:
    """Return the record of a cell that has run; a driver that was refused leaves none."""
    try:
        return read_record(cell.folder)
    except FileNotFoundError:
        raise ConfigError(f"{cell.title} left no {FILE_NAME}; run the command again") from None


def _record(
    candidates: Sequence[tuple[Cell, list[str]]],
    details: Mapping[str, Any],
    baseline: Cell,
    arguments: Sequence[str],
    started: datetime,
    seconds: float,
) -> Record:
    key = digest([[cell.key for cell, _ in candidates], details["criterion"]])[:KEY_LENGTH]
    config = baseline.config
    name = f"search-{config['model']['name']}-{config['hardware']['name']}-{key}"
    hardware = instantiate(config["hardware"])
    return Record(
        cell=name,
        status="ok",
        config={
            **baseline.summary(),
            "job": "search",
            "command": shlex.join(["python", "run.py", *arguments]),
        },
        # Facts of a card need torch, which a driver never imports.
        environment=describe(replace(hardware, device="cpu")),
        details={"search": dict(details)},
        started=started.isoformat(timespec="seconds"),
        seconds=seconds,
    )
