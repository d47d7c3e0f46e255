"""One grid point, from a composed configuration to its record. Torch-free: children do the work."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness import identity
from harness.artefacts import ArtefactError, training_state, verify
from harness.claim import claim
from harness.hardware import Hardware, describe
from harness.launch import EXIT_REFERENCE_MISSING, Outcome, Stage, run_child
from harness.record import (
    FILE_NAME,
    Failure,
    Record,
    RecordError,
    digest,
    read_record,
    write_record,
)
from harness.samples import FILE_NAME as SAMPLES
from harness.task_identity import task_identity
from kernels.errors import ConfigError

REPEATED = ("seed", "calibration", "none")
"""What makes rows of a report repetitions of one another."""


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


def plan_cell(config: DictConfig, overrides: Sequence[str]) -> Cell:
    """Return the cell of a composed configuration.

    Raises:
        ConfigError: a model, text or value that this cell needs is missing or wrong.
    """
    resolved = _resolve(config)
    runs_dir = Path(resolved["runs_dir"]).absolute()
    model, data = _instantiate(resolved["model"]), _instantiate(resolved["data"])
    _instantiate(resolved["hardware"])
    # A folder's or a hub model's own name says more than the name of the choice.
    resolved["model"]["name"] = model.name
    size_only = bool(resolved["suite"].get("size_only"))
    if size_only:
        model_identity, evaluation, tasks = model.architecture_identity(), "", []
    else:
        model_identity = model.identity(runs_dir / "cache" / "digests.json")
        evaluation = data.evaluation_digest()
        if identity.calibrates(resolved["job"].get("options")):
            # A job's own calibration text decides its figures as the evaluation text does a row's.
            evaluation += data.calibration_digest()
        measures = resolved["suite"]["measures"].values()
        tasks = task_identity(measures, data.task_folder(), runs_dir / "cache")
    if "commit" in model_identity:
        # The children load exactly what the keys were computed from.
        resolved["model"]["revision"] = model_identity["commit"]
    reference = model_identity.get("reference", {})
    if "commit" in reference:
        resolved["model"]["reference"] = f"{reference['id']}@{reference['commit']}"

    def key_of(node: dict[str, Any]) -> str:
        shown = identity.calibrates(node) and not size_only
        calibration = data.calibration_digest() if shown else None
        return identity.artefact_key(model_identity, node, calibration, resolved["seed"])

    artefact, baseline = key_of(resolved["method"]), key_of(resolved["baseline"])
    key = identity.cell_key(artefact, baseline, resolved, evaluation, tasks)
    model_key = digest(model_identity)
    return Cell(
        config=resolved,
        runs_dir=runs_dir,
        command=shlex.join(["python", "run.py", *overrides]),
        id=identity.cell_id(resolved, key),
        key=key,
        artefact_key=artefact,
        baseline_key=baseline,
        model_key=model_key,
        reference_key=identity.reference_key(model_key, resolved, evaluation),
        evaluation=evaluation,
        model_identity=model_identity,
        random_weights=model.random_weights,
        # A server's model is compared only where asked: its weights need not be here.
        has_reference=model.original() is not None and resolved["method"].get("compare", True),
    )


def _resolve(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain data, with the chosen source of text alone as `data`."""
    source = config.data.source
    choices = [key for key, node in config.data.items() if isinstance(node, DictConfig)]
    if source not in choices:
        raise ConfigError(f"data.source is {source!r}; it must be one of {', '.join(choices)}")
    try:
        chosen: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
            config.data[source], resolve=True
        )
        rest = OmegaConf.masked_copy(config, [str(key) for key in config if key != "data"])
        resolved: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
            rest, resolve=True, throw_on_missing=True
        )
    except OmegaConfBaseException as error:
        raise ConfigError(_missing_value(error)) from error
    if resolved["repeat"] not in REPEATED:
        raise ConfigError(
            f"repeat is {resolved['repeat']!r}; it must be one of {', '.join(REPEATED)}"
        )
    if not isinstance(resolved["baseline"], dict):
        wanted = resolved["baseline"]
        raise ConfigError(
            f"baseline is {wanted!r}; it is chosen among the methods: method@baseline={wanted}"
        )
    then = resolved["method"].get("then")
    if isinstance(then, str):
        raise ConfigError(
            f"method.then is {then!r}; it is chosen among the methods: method@method.then={then}"
        )
    if "path" in chosen and chosen["path"] is None:
        raise ConfigError(
            f"data.source is {source!r}, which reads from a path; give it: data.path=PATH"
        )
    return {**resolved, "data": chosen}


def _instantiate(node: dict[str, Any]) -> Any:
    """Instantiate a torch-free node; a mistake in its values comes out as ConfigError alone."""
    try:
        return instantiate(node)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise ConfigError(" ".join(str(error).split())) from error


def _missing_value(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    if key and "Missing mandatory value" in str(error):
        return f"{key} has no value; give one: {key}=VALUE"
    return " ".join(str(error).split())


def run_cell(cell: Cell, stage: Stage) -> str:
    """Run `cell` unless its record is there; return `ok`, `partial`, `failed` or `there`."""
    with claim(
        cell.folder / "claim", lambda holder: stage(f"waiting: {holder} runs this cell")
    ) as waited:
        # What another sweep has just finished is not run again, not even by force.
        if cell.finished() and (waited or not cell.config["force"]):
            return "there"
        if cell.config["force"]:
            artefact = cell.artefact(cell.artefact_key)
            for folder in (artefact, training_state(artefact)):
                shutil.rmtree(folder, ignore_errors=True)
        for name in (FILE_NAME, SAMPLES):
            (cell.folder / name).unlink(missing_ok=True)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        failure = _run_stages(cell, stage)
        if failure is not None:
            _write_failed(cell, failure, started)
            return "failed"
        return read_record(cell.folder).status


def _run_stages(cell: Cell, stage: Stage) -> Failure | None:
    """Make what is missing, then measure; return the failure of the first stage that failed."""
    hardware: Hardware = instantiate(cell.config["hardware"])
    if cell.child is not None:
        return run_child(cell.child, _job(cell), cell.folder, hardware, stage).failure
    if _wants_baseline(cell):
        failure = _ensure_artefact(cell, "baseline", cell.baseline_key, hardware, stage)
        if failure is not None:
            return failure
    failure = _ensure_artefact(cell, "method", cell.artefact_key, hardware, stage)
    if failure is not None:
        return failure
    failure = _ensure_reference(cell, hardware, stage)
    if failure is not None:
        return failure
    outcome = _measure(cell, hardware, stage)
    if outcome.exit_code == EXIT_REFERENCE_MISSING:
        # The marker was there but an entry is absent or damaged: compute it again, once.
        _marker(cell).unlink(missing_ok=True)
        failure = _ensure_reference(cell, hardware, stage)
        if failure is not None:
            return failure
        outcome = _measure(cell, hardware, stage)
    if not cell.config["keep_artefacts"] and cell.artefact_key != cell.baseline_key:
        shutil.rmtree(cell.artefact(cell.artefact_key), ignore_errors=True)
    return outcome.failure


def _measure(cell: Cell, hardware: Hardware, stage: Stage) -> Outcome:
    return run_child("harness.measure:main", _job(cell), cell.folder, hardware, stage)


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


def _ensure_artefact(
    cell: Cell, role: str, key: str, hardware: Hardware, stage: Stage
) -> Failure | None:
    """Make the artefact of the cell's method or baseline unless it is there and verifies."""
    folder = cell.artefact(key)
    with claim(folder.with_suffix(".claim"), lambda holder: stage(f"waiting: {holder} quantizes")):
        if not _verifies(folder):
            job = {**_job(cell), "method": cell.config[role], "artefact": str(folder)}
            outcome = run_child("harness.quantize:main", job, cell.folder, hardware, stage)
            if not outcome.ok:
                return outcome.failure
    if role == "method":
        link = cell.folder / "artefact"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / folder.relative_to(cell.runs_dir))
    return None


def _verifies(folder: Path) -> bool:
    try:
        verify(folder)
    except ArtefactError:
        return False
    return True


def _ensure_reference(cell: Cell, hardware: Hardware, stage: Stage) -> Failure | None:
    if not cell.has_reference:
        return None
    marker = _marker(cell)
    with claim(
        marker.with_suffix(".claim"), lambda holder: stage(f"waiting: {holder} runs the reference")
    ):
        if marker.exists():
            return None
        return run_child("harness.reference:main", _job(cell), cell.folder, hardware, stage).failure


def _marker(cell: Cell) -> Path:
    """Return the file that says that the reference's outputs for this suite are in the cache."""
    return cell.cache / "reference" / f"{cell.reference_key[:32]}.done"


def _write_failed(cell: Cell, failure: Failure, started: str) -> None:
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
    write_record(record, cell.folder)
