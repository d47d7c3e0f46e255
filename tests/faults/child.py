"""The child of a cell that costs nothing and leaves what a real one does: cache, artefact, record.

Its values follow from its seed, so a wrong one is known when it is read. Between its steps it
sleeps for moments, in which it may be killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from harness.artefacts import ArtefactError, Manifest, file_facts, publish, verify
from harness.cache import Cache
from harness.launch import Stage
from harness.record import Failure, Record, Value, write_record
from harness.temporary import remove, temporary_beside

SHARED = 4
"""Cells of equal remainder share an entry of the cache."""
METRICS = ("cached", "stored", "first", "second")
NUMBERS = 5000
STEP_SECONDS = 0.01
MISBEHAVES = "QUANTBENCH_FAULTS_MISBEHAVES"
"""Variable that lets the children of the first seeds behind 0 do what no child should."""
WAYS = ("hang", "memory", "log", "leave")
HANG_SECONDS = 600
BLOCKS, BLOCK_NUMBERS = 400, 1 << 20
"""1.6 GB in all."""
LINE_REPEATS = 1000


def right_value(metric: str, seed: int) -> float:
    """Return the value that the cell of `seed` has to have."""
    shared = METRICS.index(metric)
    return float(NUMBERS * (seed % SHARED if metric == "cached" else seed) + shared)


def main(job: dict[str, Any], stage: Stage) -> None:
    """Leave the entry, the artefact and the record of the cell that `job` describes."""
    seed = job["config"]["seed"]
    stage("cache")
    found = {"cached": _cached(Cache(Path(job["cache"])), seed)}
    stage("artefact")
    found["stored"] = _stored(Path(job["artefact"]), seed)
    if MISBEHAVES in os.environ:
        _misbehave(dict(enumerate(WAYS, 1)).get(seed))
    for metric in METRICS[2:]:
        stage(metric)
        _write(job, found, metric)
        time.sleep(STEP_SECONDS)
        found[metric] = right_value(metric, seed)
    _write(job, found, None)


def _misbehave(how: str | None) -> None:
    """Do what no child should; None is nothing."""
    if how == "hang":
        _sleepers()
        time.sleep(HANG_SECONDS)
    elif how == "memory":
        blocks = [torch.ones(BLOCK_NUMBERS) for _ in range(BLOCKS)]
        raise AssertionError(f"{len(blocks)} blocks fit")
    elif how == "log":
        while True:
            print("a line that says nothing " * LINE_REPEATS)
    elif how == "leave":
        _sleepers()
        os._exit(7)


def _sleepers() -> None:
    """Start processes that outlive their parent, in its session and in one of their own."""
    for own in (False, True):
        command = [sys.executable, "-c", f"import time; time.sleep({HANG_SECONDS})"]
        subprocess.Popen(command, start_new_session=own)


def _numbers(metric: str, seed: int) -> torch.Tensor:
    numbers = torch.zeros(NUMBERS, dtype=torch.float64)
    numbers[:] = right_value(metric, seed) / NUMBERS
    return numbers


def _cached(cache: Cache, seed: int) -> float:
    def build() -> dict[str, torch.Tensor]:
        time.sleep(STEP_SECONDS)
        return {"numbers": _numbers("cached", seed)}

    numbers = cache.get("faults", [seed % SHARED], build)["numbers"]
    return float(round(numbers.sum().item()))


def _stored(artefact: Path, seed: int) -> float:
    """Make the artefact unless it is there and verifies; return what its file says."""
    try:
        verify(artefact)
    except ArtefactError:
        _make(artefact, seed)
    return float((artefact / "value.txt").read_text().split()[0])


def _make(artefact: Path, seed: int) -> None:
    temporary = temporary_beside(artefact)
    temporary.mkdir(parents=True)
    try:
        text = f"{right_value('stored', seed)}\n" * NUMBERS
        (temporary / "value.txt").write_text(text)
        time.sleep(STEP_SECONDS)
        shutil.copy(temporary / "value.txt", temporary / "again.txt")
        manifest = Manifest(
            files=file_facts(temporary),
            method="faults",
            bits=None,
            group_size=None,
            matrices=[],
            stored_bits=0,
            left_out=[],
            notes=[],
            quantize_seconds=None,
            quantize_peak_bytes=None,
            model={},
            calibration=None,
            unquantized=None,
            details={},
        )
        publish(temporary, artefact, manifest)
    finally:
        remove(temporary)


def _write(job: dict[str, Any], found: dict[str, float], next_step: str | None) -> None:
    values = tuple(
        Value("faults", metric, "known", value, "1", None, samples=(value, value))
        for metric, value in found.items()
    )
    errors = () if next_step is None else (Failure(next_step, "interrupted", "it ended here"),)
    record = Record(
        cell=job["cell"],
        status="ok" if next_step is None else "failed",
        config=job["summary"],
        values=values,
        errors=errors,
    )
    write_record(record, Path(job["folder"]))
