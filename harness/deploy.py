"""job=deploy: a configuration is quantized, loaded again, measured, and held against limits.

What is measured is a cell like any other (suite `deploy`), so it stands in the table, is made once
and is found again by later commands. The checks are a record of their own, beside it. Torch-free.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from harness.cell import Cell
from harness.hardware import describe, machine_name
from harness.identity import KEY_LENGTH
from harness.increase import paired_increase, window_losses
from harness.jobs import baseline_cell, refuse, run_planned
from harness.plan import extend_plan
from harness.planning import plan_cell
from harness.record import Record, Value, digest, read_record, write_record
from harness.sweep import plan_cells
from harness.units import BYTES, PLAIN, SECONDS, SHARES, parse
from kernels.errors import ConfigError

LEVEL = 0.95
"""Of the interval that is shown beside the accuracy gate."""

GATES = (
    ("max_size", "artefact_bytes", BYTES, "B"),
    ("max_memory", "peak_memory_bytes", BYTES, "B"),
    ("max_ttft", "ttft_seconds", SECONDS, "s"),
    ("max_tpot", "tpot_seconds", SECONDS, "s"),
    ("min_decode_tokens_per_second", "decode_tokens_per_second", PLAIN, "tokens/s"),
)
"""Option, the metric that it limits, the units that it is written in, the metric's own unit."""

Limit = str | float | None


@dataclass(frozen=True)
class Check:
    """One question asked of the deployed artefact.

    Attributes:
        name: what was asked.
        wanted: the limit in `unit`; None where the figure is only shown.
        found: what was measured; None where it was not.
        passed: None where there was no limit or nothing to hold against it.
        why: what the figure is, or why there is none.
    """

    name: str
    wanted: float | str | None
    found: float | str | None
    unit: str
    passed: bool | None
    why: str


@dataclass(frozen=True)
class DeployJob:
    """Runs the cell of one configuration and its baseline's, then the checks.

    Attributes:
        max_increase: of perplexity over the baseline's, a share.
        max_size: bytes of the artefact's files.
        max_memory: peak bytes of the process that loads it, reads and writes.
        max_ttft: seconds to the first token.
        max_tpot: seconds of each further token.
        min_decode_tokens_per_second: least speed of decoding.
    """

    name: str
    max_increase: Limit = "3%"
    max_size: Limit = None
    max_memory: Limit = None
    max_ttft: Limit = None
    max_tpot: Limit = None
    min_decode_tokens_per_second: Limit = None

    def run(self, config: DictConfig) -> str:
        """Deploy what `config` says; returns `passed` or `not passed`, the exit status follows."""
        hydra = HydraConfig.get()
        folder = Path(hydra.run.dir).absolute()
        overrides = list(hydra.overrides.task)
        started, begun = datetime.now(UTC), time.monotonic()
        try:
            limits = self.limits()
            cell, baseline = _cells(config, overrides)
            plan_cells([baseline, cell] if baseline.id != cell.id else [cell], folder)
        except ConfigError as error:
            refuse(error)
        for each in (baseline, cell):
            run_planned(each, folder)
        try:
            checks = checks_of(read_record(cell.folder), read_record(baseline.folder), limits)
        except FileNotFoundError:
            return "failed"  # the closing report names the cell that left no record
        record = _record(config, cell, checks, overrides, started, time.monotonic() - begun)
        write_record(record, cell.runs_dir / record.cell)
        extend_plan(folder, [record.cell])
        return "passed" if record.details["deploy"]["passed"] else "not passed"

    def limits(self) -> dict[str, float]:
        """Return option -> its limit in plain units, for the options that are set.

        Raises:
            ConfigError: one is no quantity of its kind, or there is none for accuracy.
        """
        if self.max_increase is None:
            raise ConfigError(
                "job.max_increase is null, but a deployment without a limit of accuracy checks "
                "nothing that quantizing may break; give one: job.max_increase=3%"
            )
        units = {"max_increase": SHARES} | {option: table for option, _, table, _ in GATES}
        given = {option: getattr(self, option) for option in units}
        return {
            option: parse(value, units[option], f"job.{option}")
            for option, value in given.items()
            if value is not None
        }


def _cells(config: DictConfig, overrides: list[str]) -> tuple[Cell, Cell]:
    """Return the cell of `config`, as job=cell would run it, and the baseline's.

    Raises:
        ConfigError: there is nothing to compare with, or something is missing or wrong.
    """
    changed = config.copy()
    with open_dict(changed):
        changed.job = OmegaConf.create({"_target_": "harness.jobs.CellJob", "name": "cell"})
    kept = [o for o in overrides if not o.startswith(("job=", "job."))]
    if not any(o.startswith("suite=") for o in kept):
        kept.append(f"suite={config.suite.name}")
    cell = plan_cell(changed, kept)
    if not cell.has_reference:
        raise ConfigError(
            f"model {cell.config['model']['name']} has no unquantized original to hold it against; "
            "name it with model.reference=FOLDER or OWNER/NAME"
        )
    return cell, baseline_cell(changed, kept)


def checks_of(record: Record, baseline: Record, limits: Mapping[str, float]) -> list[Check]:
    """Return the checks of a cell's `record` against its baseline's and the `limits` set."""
    loaded = bool(record.values) and record.status != "failed"
    why = "; ".join(error.message for error in record.errors)
    said = "quantized, written, and loaded again from disk" if loaded else why
    return [
        Check("quantized and loaded again", "yes", "yes" if loaded else "no", "", loaded, said),
        _figure(record, "non_finite_logits", 0.0, "logits that are not finite"),
        _figure(record, "repeated_tokens_equal", 1.0, "greedy text equal when written again"),
        _paths(record),
        _increase(record, baseline, limits["max_increase"]),
        *(
            _gate(record, metric, limits.get(option), unit, lower=option.startswith("max"))
            for option, metric, _, unit in GATES
        ),
    ]


def _first(record: Record, metric: str) -> Value | None:
    return next((value for value in record.values if value.metric == metric), None)


def _figure(record: Record, metric: str, wanted: float, name: str) -> Check:
    """Return a check of a figure that has to be exactly `wanted`."""
    value = _first(record, metric)
    if value is None:
        return Check(name, wanted, None, "", None, _why_not(record, "functional"))
    return Check(name, wanted, value.value, value.unit, value.value == wanted, value.protocol)


def _paths(record: Record) -> Check:
    """Return whether packed kernels compute what the stored weights say, prefill and decode."""
    name = "packed against dequantized logits"
    found = [v for v in record.values if v.measure == "paths"]
    if not found:
        failed = any(error.stage == "paths" for error in record.errors)
        why = _why_not(record, "paths", "the method has one path only, nothing to compare")
        return Check(name, None, None, "ratio", False if failed else None, why)
    tolerance = float(record.details["paths"]["tolerance"])
    worst = max(v.value for v in found)
    return Check(name, tolerance, worst, "ratio", worst <= tolerance, "prefill and decode")


def _increase(record: Record, baseline: Record, limit: float) -> Check:
    """Return the accuracy gate: the point estimate decides, the interval stands beside it."""
    name = "perplexity above the baseline"
    own, other = window_losses(record), window_losses(baseline)
    if own is None or other is None or own.protocol != other.protocol:
        missing = record if own is None else baseline
        return Check(name, limit, None, "share", False, _why_not(missing, "perplexity"))
    found = paired_increase(own.samples, other.samples, "perplexity", LEVEL)
    why = f"{own.value:.4g} against {other.value:.4g} on {own.protocol}, {found.windows} windows"
    if found.interval:
        why += f"; {LEVEL:.0%} interval {found.interval}"
        if found.low is not None and found.high is not None and found.low <= limit < found.high:
            why += ", around the limit: more windows may decide otherwise"
    return Check(name, limit, found.value, "share", found.value <= limit, why)


def _gate(record: Record, metric: str, limit: float | None, unit: str, lower: bool) -> Check:
    """Return the check of one figure; a limit that could not be checked is not kept."""
    value = _first(record, metric)
    name = metric.removesuffix(f"_{'seconds' if unit == 's' else 'bytes'}").replace("_", " ")
    if value is None:
        kept = None if limit is None else False
        return Check(name, limit, None, unit, kept, _why_not(record, value_measure(metric)))
    if limit is None:
        return Check(name, None, value.value, unit, None, f"{value.protocol}; no limit was given")
    kept = value.value <= limit if lower else value.value >= limit
    return Check(name, limit, value.value, unit, kept, value.protocol)


def value_measure(metric: str) -> str:
    """Return the measure of the suite that gives a gate's metric."""
    return {"artefact_bytes": "size", "peak_memory_bytes": "memory"}.get(metric, "speed")


def _why_not(record: Record, measure: str, otherwise: str = "") -> str:
    """Return why `record` has no figure of `measure`."""
    said = [error.message for error in record.errors if error.stage == measure]
    said += [note for note in record.details.get("notes", []) if note.startswith(measure)]
    said += [error.message for error in record.errors if record.status == "failed"]
    return said[0] if said else otherwise or "the suite does not measure it"


def _record(
    config: DictConfig,
    cell: Cell,
    checks: list[Check],
    overrides: list[str],
    started: datetime,
    seconds: float,
) -> Record:
    profile = OmegaConf.select(config, "profile", default=None)
    key = digest([cell.key, [asdict(check)["wanted"] for check in checks]])[:KEY_LENGTH]
    hardware = instantiate(cell.config["hardware"])
    name = None if profile is None else str(profile.name)
    parts = ["deploy", cell.config["model"]["name"], name or cell.config["method"]["name"]]
    details = {
        "profile": name,
        "cell": cell.id,
        "checks": [asdict(check) for check in checks],
        "passed": all(check.passed is not False for check in checks),
        "artefact": str(cell.artefact(cell.artefact_key).relative_to(cell.runs_dir)),
        "checked_on": f"{machine_name(hardware.device)} ({platform.machine()})",
        "meant_for": None if profile is None else str(profile.device),
    }
    return Record(
        cell="-".join([*parts, cell.config["hardware"]["name"], key]),
        status="ok",
        config={
            **cell.summary(),
            "job": "deploy",
            "command": " ".join(["python", "run.py", *overrides]),
        },
        # Facts of a card need torch, which a driver never imports.
        environment=describe(replace(hardware, device="cpu")),
        details={"deploy": details},
        started=started.isoformat(timespec="seconds"),
        seconds=seconds,
    )
