"""Readers of what the harness leaves: records, manifests, plans. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness import artefacts, plan, record
from tests.fuzz.mutation import json_changes
from tests.fuzz.target import Target


def example() -> record.Record:
    """Return a record with everything a record can have."""
    values = (
        record.Value("perplexity", "perplexity", "text_1024", 5.5, "", False, 0.1, (1.5, 2.0)),
        record.Value("tasks", "acc", "hellaswag_0shot", math.inf, "share", True),
    )
    return record.Record(
        cell="m-rtn-4b-g128-cpu-smoke-0123456789ab",
        status="partial",
        config={"model": "m", "method": "rtn", "bits": 4, "resolved": {"seed": 1}},
        values=values,
        errors=(record.Failure("speed", "ValueError", "timing is wrong"),),
        environment={"cpu": "x", "packages": {"torch": "2"}},
        details={"notes": ["a ‖ b"], "kernels": [{"execution": "packed", "weights": 3}]},
        started="2026-01-01T00:00:00+00:00",
        seconds=1.5,
    )


def sealed(part: str) -> Any:
    """Return what puts the right digest beside `part` of a document, where there is one."""

    def seal(document: Any) -> Any:
        if isinstance(document, dict) and part in document:
            # Half a character has no digest.
            with suppress(ValueError, RecursionError):
                document["digest"] = record.digest(document[part])
        return document

    return seal


def _record_seeds(folder: Path) -> Sequence[bytes]:
    made = [example(), record.Record("cell", "ok", {})]
    return [record.write_record(one, folder / one.cell).read_bytes() for one in made]


def _read_record(data: bytes, folder: Path) -> None:
    (folder / record.FILE_NAME).write_bytes(data)
    found = record.read_record(folder)
    # What was taken can be written again, and is the same then.
    record.digest(record.asdict(found))


def _artefact(folder: Path) -> None:
    """Write the files of an artefact, without their manifest, into `folder`."""
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(bytes(range(64)))
    (folder / "sub" / "layers.json").write_text("{}")


def _manifest_seeds(folder: Path) -> Sequence[bytes]:
    temporary = folder / "temporary"
    temporary.mkdir()
    _artefact(temporary)
    manifest = artefacts.Manifest(
        files=artefacts.file_facts(temporary),
        method="rtn",
        bits=4.0,
        group_size=128,
        matrices=[{"name": "a.b", "role": "block", "out_features": 2, "in_features": 4}],
        stored_bits=64,
        left_out=[["embed", 3, "outside"]],
        notes=["note"],
        quantize_seconds=0.5,
        quantize_peak_bytes=7,
        model={"parameters": 3},
        calibration={"text": "x"},
        unquantized=None,
        details={"a": 1},
    )
    artefacts.publish(temporary, folder / "artefact", manifest)
    return [(folder / "artefact" / artefacts.MANIFEST).read_bytes()]


def _read_manifest(data: bytes, folder: Path) -> None:
    (folder / artefacts.MANIFEST).write_bytes(data)
    artefacts.verify(folder)


def _plan_seeds(folder: Path) -> Sequence[bytes]:
    plan.write_plan(folder, ["a", "b", "c"], ["a"])
    return [(folder / plan.FILE_NAME).read_bytes()]


def _read_plan(data: bytes, folder: Path) -> None:
    (folder / plan.FILE_NAME).write_bytes(data)
    found = plan.read_plan(folder)
    json.dumps(found.missing)
    for cell in found.cells:
        # As the closing report does.
        (folder / cell / record.FILE_NAME).is_file()


TARGETS = (
    Target(
        "record", _read_record, (record.RecordError,), _record_seeds, json_changes(sealed("record"))
    ),
    Target(
        "manifest",
        _read_manifest,
        (artefacts.ArtefactError,),
        _manifest_seeds,
        json_changes(sealed("manifest")),
        setup=_artefact,
    ),
    Target("plan", _read_plan, (plan.PlanError,), _plan_seeds, json_changes()),
)
