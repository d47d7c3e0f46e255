"""One grid point, from its identities to its record. Torch-free: children do the work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from harness import identity
from harness.artefacts import MANIFEST, ArtefactError, training_state, verify
from harness.claim import Held, TakenOverError, claim, still_held
from harness.hardware import Hardware, describe, other_machine
from harness.launch import EXIT_REFERENCE_MISSING, TAKEN_OVER, Outcome, Stage, run_child
from harness.lm_eval_results import FILE_NAME as LM_EVAL
from harness.record import (
    FILE_NAME,
    Failure,
    Record,
    RecordError,
    read_record,
    write_record,
)
from harness.samples import FILE_NAME as SAMPLES
from harness.temporary import remove_unfinished


@dataclass(frozen=True)
class Cell:
    """A grid point with its identities.

    Attributes:
        config: the resolved configuration.
        runs_dir: folder of everything the sweep leaves.
        command: the command that runs this cell again.
        id: name of its folder below `runs_dir`.
        key, artefact_key, baseline_key, model_key: the identities, as digests.
        evaluation: digest of the evaluation text, empty where none is read.
        has_reference: whether there is an unquantized model to compare with.
    """

    config: dict[str, Any]
    runs_dir: Path
    command: str
    id: str
    key: str
    artefact_key: str
    baseline_key: str
    model_key: str
    reference_key: str
    evaluation: str
    model_identity: dict[str, Any]
    random_weights: bool
    has_reference: bool

    @property
    def folder(self) -> Path:
        """Where the record goes."""
        return self.runs_dir / self.id

    @property
    def cache(self) -> Path:
        """What cells share."""
        return self.runs_dir / "cache"

    @property
    def title(self) -> str:
        """The cell as a progress line names it."""
        job = self.config["job"]["name"]
        kind = "" if job == "cell" else f"{job} "
        return f"{kind}{self.config['model']['name']} {_method_title(self.config['method'])}"

    @property
    def child(self) -> str | None:
        """The one child that does everything, as `module:function`; None: the way of a row."""
        if self.config["suite"].get("size_only"):
            return "harness.sizes:main"
        child: str | None = self.config["job"].get("child")
        return child

    def artefact(self, key: str) -> Path:
        """Return the folder of an artefact."""
        return self.cache / "artefacts" / key[: 2 * identity.KEY_LENGTH]

    def finished(self) -> bool:
        """Whether an `ok` record of this cell is there."""
        try:
            return read_record(self.folder).status == "ok"
        except (FileNotFoundError, RecordError):
            return False

    def summary(self) -> dict[str, Any]:
        """Return the axes and identities for the record."""
        method = self.config["method"]
        return {
            "job": self.config["job"]["name"],
            "model": self.config["model"]["name"],
            "method": method["name"],
            "bits": method.get("bits"),
            "group_size": method.get("group_size"),
            "hardware": self.config["hardware"]["name"],
            "suite": self.config["suite"]["name"],
            "data": self.config["data"]["name"],
            "baseline": self.config["baseline"]["name"],
            "cell_key": self.key,
            "artefact_key": self.artefact_key,
            "evaluation_digest": self.evaluation or None,
            "command": self.command,
            "random_weights": self.random_weights,
            "resolved": self.config,
        }


def _method_title(method: dict[str, Any]) -> str:
    bits = f" {method['bits']} bits" if method.get("bits") is not None else ""
    size = method.get("group_size")
    group = "" if size is None else " per channel" if size == -1 else f" group {size}"
    if method.get("per_tensor"):
        group = " per tensor"
    # A method may hand its model on to another.
    then = method.get("then")
    rest = f", then {_method_title(then)}" if then else ""
    return f"{method['name']}{bits}{group}{rest}"


MEASURE_ATTEMPTS = 3
MADE = (FILE_NAME, SAMPLES, LM_EVAL)
"""What measuring a cell leaves in its folder."""
ELSEWHERE = "elsewhere"
"""How a cell ended that another sweep runs."""


class _ElsewhereError(Exception):
    """Another sweep holds the cell, and it was not to be waited for."""


def run_cell(cell: Cell, stage: Stage, wait: bool = True) -> str:
    """Run `cell` unless its record is there; return `ok`, `partial`, `failed` or `there`.

    Where another sweep runs it, `wait` for that; or return `elsewhere`, as where it was taken over
    from this process.
    """

    def waiting(holder: str) -> None:
        if not wait:
            raise _ElsewhereError
        stage(f"waiting: {holder} runs this cell")

    if cell.finished() and not cell.config["force"]:
        return "there"
    try:
        with claim(cell.folder / "claim", waiting, until=cell.finished) as held:
            if held is None:
                return "there"
            # First of all, or a late owner could still finish what is then begun again.
            remove_unfinished(cell.folder)
            # What another sweep has just finished is not run again, not even by force.
            if cell.finished() and (held.waited or not cell.config["force"]):
                return "there"
            return _run_held(cell, held, stage)
    except _ElsewhereError:
        return ELSEWHERE


def _run_held(cell: Cell, held: Held, stage: Stage) -> str:
    if cell.config["force"]:
        _drop(cell, cell.artefact(cell.artefact_key))
    before = [path for path in map(cell.folder.joinpath, MADE) if path.exists()]
    if held.lost():
        return ELSEWHERE
    for path in before:
        path.unlink(missing_ok=True)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    failure = _Stages(cell, held, stage).run()
    if held.lost() or (failure is not None and failure.kind == TAKEN_OVER):
        return ELSEWHERE
    # A child that is killed behind its last word has done its work: what is finished stays.
    if failure is not None and not cell.finished():
        try:
            with still_held(held.path) as last_look:
                _write_failed(cell, failure, started, last_look)
        except TakenOverError:
            return ELSEWHERE
        return "failed"
    return read_record(cell.folder).status


def _drop(cell: Cell, artefact: Path) -> None:
    """Remove an artefact and what training left of it; waits for whoever is making it."""
    with claim(_claim_of(artefact), lambda holder: None):
        for folder in (artefact, training_state(artefact)):
            shutil.rmtree(folder, ignore_errors=True)


def _claim_of(path: Path) -> Path:
    return path.with_suffix(".claims") / "claim"


@dataclass(frozen=True)
class _Stages:
    """The children of one cell that is held."""

    cell: Cell
    held: Held
    stage: Stage

    def run(self) -> Failure | None:
        """Make what is missing, then measure; return the failure of the first stage that failed."""
        cell = self.cell
        # A speed belongs to the machine in the cell's key.
        wrong = other_machine(instantiate(cell.config["hardware"]))
        if wrong is not None:
            return Failure("plan", "machine", wrong)
        if cell.child is not None:
            return self._child(cell.child, _job(cell)).failure
        for _ in range(MEASURE_ATTEMPTS):
            failure = self._prepare()
            if failure is not None:
                return failure
            before = self._stamps()
            outcome = self._child("harness.measure:main", _job(cell))
            if outcome.exit_code == EXIT_REFERENCE_MISSING:
                # The marker was there but an entry is absent or damaged: compute it again.
                _marker(cell).unlink(missing_ok=True)
            elif not self._undermined(outcome, before):
                break
        if self.held.lost():
            return outcome.failure
        if not cell.config["keep_artefacts"] and cell.artefact_key != cell.baseline_key:
            _drop(cell, cell.artefact(cell.artefact_key))
        return outcome.failure

    def _child(self, target: str, job: dict[str, Any]) -> Outcome:
        hardware: Hardware = instantiate(self.cell.config["hardware"])
        job = {**job, "claim": str(self.held.path)}
        return run_child(target, job, self.cell.folder, hardware, self.stage, self.held.lost)

    def _prepare(self) -> Failure | None:
        """Make artefacts and reference that are missing; return the failure of the first."""
        cell = self.cell
        failure = None
        if _wants_baseline(cell):
            failure = self._ensure_artefact("baseline", cell.baseline_key)
        failure = failure or self._ensure_artefact("method", cell.artefact_key)
        return failure or self._ensure_reference()

    def _undermined(self, outcome: Outcome, before: list[tuple[int, int] | None]) -> bool:
        """Whether an artefact was damaged, or removed by another sweep (keep_artefacts=false)."""
        if self.cell.finished() or self.held.lost():
            return False
        if self._stamps() != before:
            return True
        return not (outcome.ok or all(map(_verifies, self._artefacts())))

    def _stamps(self) -> list[tuple[int, int] | None]:
        return [_stamp(folder) for folder in self._artefacts()]

    def _artefacts(self) -> list[Path]:
        keys = [self.cell.artefact_key]
        keys += [self.cell.baseline_key] if _wants_baseline(self.cell) else []
        return [self.cell.artefact(key) for key in keys]

    def _ensure_artefact(self, role: str, key: str) -> Failure | None:
        """Make the artefact of the cell's method or baseline unless it is there and verifies."""
        cell = self.cell
        folder = cell.artefact(key)
        made = False
        while not (made or _verifies(folder)):
            before = _stamp(folder)
            with claim(
                _claim_of(folder),
                lambda holder: self.stage(f"waiting: {holder} quantizes"),
                until=lambda: _stamp(folder) not in (None, before),  # noqa: B023  # used here alone
            ) as held:
                if held is None or _verifies(folder):
                    continue
                job = {**_job(cell), "method": cell.config[role], "artefact": str(folder)}
                outcome = self._child("harness.quantize:main", job)
                if not outcome.ok:
                    return outcome.failure
                made = True
        if role == "method":
            link = cell.folder / "artefact"
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..") / folder.relative_to(cell.runs_dir))
        return None

    def _ensure_reference(self) -> Failure | None:
        cell = self.cell
        if not cell.has_reference:
            return None
        marker = _marker(cell)
        while not marker.exists():
            with claim(
                _claim_of(marker),
                lambda holder: self.stage(f"waiting: {holder} runs the reference"),
                until=marker.exists,
            ) as held:
                if held is not None and not marker.exists():
                    failure = self._child("harness.reference:main", _job(cell)).failure
                    if failure is not None:
                        return failure
        return None


def _job(cell: Cell) -> dict[str, Any]:
    """Return what a child is told, as JSON-like data."""
    wants_baseline = _wants_baseline(cell) and cell.baseline_key != cell.artefact_key
    return {
        "config": cell.config,
        "method": cell.config["method"],
        "cell": cell.id,
        "folder": str(cell.folder),
        "cache": str(cell.cache),
        "artefact": str(cell.artefact(cell.artefact_key)),
        "baseline_artefact": str(cell.artefact(cell.baseline_key)) if wants_baseline else None,
        "model_key": cell.model_key,
        "model_identity": cell.model_identity,
        "random_weights": cell.random_weights,
        "has_reference": cell.has_reference,
        "marker": str(_marker(cell)),
        "summary": cell.summary(),
    }


def _wants_baseline(cell: Cell) -> bool:
    if not cell.has_reference:
        return False
    measures = cell.config["suite"]["measures"].values()
    return any(node.get("interleave_baseline") for node in measures)


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Return what tells an artefact from the one that is made in its place."""
    try:
        facts = (folder / MANIFEST).stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def _verifies(folder: Path) -> bool:
    try:
        verify(folder)
    except ArtefactError:
        return False
    return True


def _marker(cell: Cell) -> Path:
    """Return the file that says that the reference's outputs for this suite are in the cache."""
    return cell.cache / "reference" / f"{cell.reference_key[:32]}.done"


def _write_failed(
    cell: Cell, failure: Failure, started: str, last_look: Callable[[], None]
) -> None:
    """Leave a failed record; values measured before the failure stay in it."""
    hardware: Hardware = instantiate(cell.config["hardware"])
    try:
        before = read_record(cell.folder)
        record = replace(
            before,
            status="failed",
            errors=(*(e for e in before.errors if e.kind != "interrupted"), failure),
        )
    except (FileNotFoundError, RecordError):
        record = Record(
            cell=cell.id,
            status="failed",
            config=cell.summary(),
            errors=(failure,),
            # Facts of a card need torch, which a driver never imports.
            environment=describe(replace(hardware, device="cpu")),
            started=started,
        )
    write_record(record, cell.folder, last_look)
