"""Second child of a cell: load the artefact and run the suite's measures.

The record is written anew after each measure, so that a crash loses the running one only.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from harness.artefacts import Manifest, read_manifest
from harness.cache import Cache
from harness.claim import still_held
from harness.context import (
    Comparing,
    Context,
    Measure,
    ReferenceMissingError,
    reference_model_key,
)
from harness.device import Device, device_of
from harness.hardware import Hardware, describe
from harness.launch import Stage
from harness.lm_eval_results import write_results
from harness.load import load_tokenizer
from harness.measures.execution import decoding
from harness.record import Failure, Record, Status, Value, write_record
from harness.samples import write_samples
from kernels.errors import ConfigError
from methods.base import Engine, KernelUse, LoadingMethod, Method, TwoPathMethod

EXECUTIONS = ("packed", "dequantized", "simulated")


class Progress:
    """The growing record of one cell, on disk after every step."""

    def __init__(self, job: dict[str, Any], hardware: Hardware) -> None:
        self.job = job
        self.start = time.perf_counter()
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.environment = describe(hardware)
        self.values: list[Value] = []
        self.sampled: list[Value] = []
        self.errors: list[Failure] = []
        self.details: dict[str, Any] = {"notes": []}
        self.lm_eval: dict[str, Any] = {}

    def still_held(self) -> AbstractContextManager[Callable[[], None]]:
        """Give the last look before a write, as `harness.claim.still_held` says."""
        claimed = self.job.get("claim")
        # Who calls a child's function by itself holds no claim, and shares the cell with nobody.
        return nullcontext(lambda: None) if claimed is None else still_held(Path(claimed))

    def write(self, status: Status, interrupted_at: str | None = None) -> None:
        """Write the record; `interrupted_at` names the step that a crash from here on would hit.

        Raises:
            TakenOverError: another sweep has begun the cell anew, and its record is not replaced.
        """
        errors = list(self.errors)
        if interrupted_at is not None:
            errors.append(Failure(interrupted_at, "interrupted", "the cell ended in this step"))
        record = Record(
            cell=self.job["cell"],
            status=status,
            config=self.job["summary"],
            values=tuple(self.values),
            errors=tuple(errors),
            environment=self.environment,
            details=self.details,
            started=self.started,
            seconds=time.perf_counter() - self.start,
        )
        with self.still_held() as last_look:
            write_results(record, self.lm_eval, Path(self.job["folder"]), last_look)
            write_record(record, Path(self.job["folder"]), last_look)


def main(job: dict[str, Any], stage: Stage) -> None:
    """Measure the artefact of `job` and leave the record in `job["folder"]`."""
    config = job["config"]
    hardware: Hardware = instantiate(config["hardware"])
    method: Method = instantiate(config["method"])
    measures: dict[str, Measure] = {
        name: instantiate(node) for name, node in config["suite"]["measures"].items()
    }
    method.check(hardware)
    manifest = read_manifest(Path(job["artefact"]))
    # The axes as the artefact has them: fp32 has 32 bits, though no option says so.
    axes = {"bits": manifest.bits, "group_size": manifest.group_size}
    progress = Progress({**job, "summary": {**job["summary"], **axes}}, hardware)
    _describe_artefact(progress, manifest)
    device = device_of(hardware.device)
    engine = _load(method, device, hardware, progress, stage)
    progress.details["runtime"] = engine.runtime
    progress.details["decoding"] = decoding(engine)
    progress.details["kernel_choices"] = getattr(engine, "choices", [])
    progress.details["notes"] += getattr(engine, "notes", ())
    _describe_kernels(progress, engine.kernels())
    context = _context(job, hardware, progress)
    artefact = Path(job["artefact"])
    context.loaders = _loaders(method, artefact, hardware)
    if isinstance(method, TwoPathMethod):
        loader, tolerance = method, method.path_tolerance
        context.dequantized = lambda: (loader.load_dequantized(artefact, hardware), tolerance)
    decisive = {name for name, one in measures.items() if getattr(one, "decisive", False)}
    first = {name for name, one in measures.items() if getattr(one, "goes_first", False)}
    for name, measure in sorted(measures.items(), key=lambda item: item[0] not in first):
        progress.write("failed", interrupted_at=name)
        # What is timed, or counts memory, is disturbed by others; quality is not.
        with device.shared(stage) if measure.quality else device.alone(stage):
            _run_one(name, measure, engine, context, progress, stage)
    engine.close()
    broken = any(error.stage in decisive for error in progress.errors)
    progress.write("failed" if broken else "partial" if progress.errors else "ok")


def _load(
    method: Method, device: Device, hardware: Hardware, progress: Progress, stage: Stage
) -> Engine:
    """Load the artefact; the seconds count where nobody else was on the device meanwhile."""
    with device.shared(stage) as alone:
        stage("loading the artefact")
        start = time.perf_counter()
        engine = method.load(Path(progress.job["artefact"]), hardware)
        _synchronize(hardware)
        seconds = time.perf_counter() - start
        undisturbed = alone()
    if "memory" not in engine.capabilities:
        return engine
    if undisturbed:
        progress.values.append(Value("load", "load_seconds", "artefact", seconds, "s", False))
    else:
        progress.details["notes"].append(
            "load_seconds not measured: other cells ran on the device meanwhile"
        )
    return engine


def _loaders(method: Method, artefact: Path, hardware: Hardware) -> dict[str, Callable[[], Engine]]:
    """Return way -> what loads the artefact so."""
    if isinstance(method, LoadingMethod):
        return {way: partial(method.load_as, way, artefact, hardware) for way in method.loadings}
    return {"": partial(method.load, artefact, hardware)}


def _run_one(
    name: str,
    measure: Measure,
    engine: Engine,
    context: Context,
    progress: Progress,
    stage: Stage,
) -> None:
    if context.random_weights and measure.quality:
        progress.details["notes"].append(f"{name} not measured: the weights are random")
        return
    if isinstance(measure, Comparing) and not context.has_reference:
        progress.details["notes"].append(
            f"{name} not measured: there is no unquantized model to compare with (of a quantized "
            "checkpoint, model.reference names it)"
        )
        return
    missing = measure.needs - engine.capabilities
    if missing:
        wanted = ", ".join(sorted(missing))
        said = f"{name} not measured: the engine ({engine.runtime}) cannot give {wanted}"
        progress.details["notes"].append(said)
        return
    stage(name)
    try:
        values = measure.run(engine, context)
    except (ReferenceMissingError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  # one measure may break, the next still runs
        progress.errors.append(_failure(name, error))
        return
    progress.values += values
    progress.errors += [_failure(name, why, part) for part, why in context.problems.items()]
    context.problems.clear()
    if measure.quality and any(value.samples for value in values):
        progress.sampled += values
        folder = Path(progress.job["folder"])
        with progress.still_held() as last_look:
            write_samples(progress.sampled, context.answers, folder, last_look)


def _failure(stage: str, error: Exception, part: str | None = None) -> Failure:
    """Return what `error` says of a measure, or of a part of it: one sentence."""
    config = isinstance(error, ConfigError)
    text = str(error) if config else " ".join(str(error).split())
    if part is not None and part not in text:
        text = f"{part}: {text}"
    return Failure(stage, "config" if config else type(error).__name__, text)


def _context(job: dict[str, Any], hardware: Hardware, progress: Progress) -> Context:
    config = job["config"]
    tokenizer = load_tokenizer(Path(job["artefact"]))
    cache = Cache(Path(job["cache"]))

    data = instantiate(config["data"])

    def load_baseline() -> Engine:
        method: Method = instantiate(config["baseline"])
        return method.load(Path(job["baseline_artefact"]), hardware)

    return Context(
        tokenizer=tokenizer,
        texts=data.texts(tokenizer, cache),
        hardware=hardware,
        artefact=Path(job["artefact"]),
        cache=cache,
        task_folder=data.task_folder(),
        model_key=reference_model_key(job),
        random_weights=job["random_weights"],
        seed=config["seed"],
        has_reference=job["has_reference"],
        resident_at_start=job["resident_at_start"],
        baseline=load_baseline if job["baseline_artefact"] else None,
        details=progress.details,
        lm_eval=progress.lm_eval,
    )


def _describe_artefact(progress: Progress, manifest: Manifest) -> None:
    quantized = sum(m["count"] * m["out_features"] * m["in_features"] for m in manifest.matrices)
    left_out = sum(entry[1] for entry in manifest.left_out)
    progress.details["coverage"] = {
        "quantized_weights": quantized,
        "total_weights": quantized + left_out,
        "left_out": manifest.left_out,
    }
    progress.details["model"] = {**manifest.model, **progress.job["model_identity"]}
    progress.details["unquantized"] = manifest.unquantized
    progress.details["method"] = manifest.details
    progress.details["calibration"] = manifest.calibration
    if manifest.calibration is not None:
        said = instantiate(progress.job["config"]["data"]).contamination()
        progress.details["notes"] += [said] if said else []
    progress.details["notes"] += manifest.notes
    if (seconds := manifest.quantize_seconds) is not None:
        progress.values.append(
            Value("quantize", "quantize_seconds", "quantize", seconds, "s", False)
        )
    if (peak := manifest.quantize_peak_bytes) is not None:
        progress.values.append(
            Value("quantize", "quantize_peak_bytes", "process_peak", float(peak), "B", False)
        )


def _describe_kernels(progress: Progress, uses: list[KernelUse]) -> None:
    """Put one line per (layer class, kernel, state) into the record, and the row's own state."""
    groups: dict[tuple[str, str, str], list[KernelUse]] = defaultdict(list)
    for use in uses:
        groups[use.layer, use.kernel, use.execution].append(use)
    progress.details["kernels"] = [
        {
            "layer": layer,
            "kernel": kernel,
            "execution": execution,
            "matrices": len(members),
            "weights": sum(use.weights for use in members),
            "example": asdict(members[0])["name"],
        }
        for (layer, kernel, execution), members in groups.items()
    ]
    # A row is only as good as its worst matrix.
    progress.details["execution"] = max(
        (use.execution for use in uses), key=EXECUTIONS.index, default=""
    )


def _synchronize(hardware: Hardware) -> None:
    if hardware.device == "cuda":
        torch.cuda.synchronize()
