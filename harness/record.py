"""What a cell leaves behind: values, each with its protocol and unit, in one record on disk.

A record is `record.json` in the cell's folder. It is written to a temporary file, synced and
renamed, and carries a SHA-256 digest of its own content, so a reader sees a whole record or none.
Standard library only: reports read records on machines without torch.

Numbers are JSON numbers as Python writes them (`NaN` and `Infinity` literals included: a
perplexity that overflowed is a result, not a missing one).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from harness import json_file as check
from harness.redact import redacted
from harness.temporary import temporary_beside

SCHEMA = 1
FILE_NAME = "record.json"

Status = Literal["ok", "partial", "failed"]


class RecordError(ValueError):
    """A record that cannot be trusted: unreadable, damaged, or of another schema."""


@dataclass(frozen=True)
class Value:
    """One measured number.

    `metric` carries its unit where it has one (`_seconds`, `_bytes`, `_per_second`); `protocol`
    names the exact way of measuring, so that equal pairs (metric, protocol) may share a column.
    `samples` are the raw observations behind the value (per window, per token, per question).
    """

    measure: str
    metric: str
    protocol: str
    value: float
    unit: str
    higher_is_better: bool | None
    stderr: float | None = None
    samples: tuple[float, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Something that went wrong in one stage of a cell, as one sentence."""

    stage: str
    kind: str
    message: str


@dataclass(frozen=True)
class Record:
    """Everything known of one cell.

    `config` holds the summary of the axes (`model`, `method`, `bits`, `group_size`, `hardware`,
    `suite`), the identities (`cell_key`, `artefact_key`), the `command` that runs the cell again
    and the `resolved` configuration. `details` holds what is not a number: kernel provenance,
    generated texts, coverage, notes.
    """

    cell: str
    status: Status
    config: dict[str, Any]
    values: tuple[Value, ...] = ()
    errors: tuple[Failure, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    seconds: float = 0.0
    schema: int = SCHEMA


def digest(payload: Any) -> str:
    """Return the SHA-256 hex digest of `payload` in canonical JSON."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomically(
    path: Path, content: bytes, last_look: Callable[[], None] = lambda: None
) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees the old file or the new one.

    `last_look` is called when all is on the disk and only its name is missing; what it raises
    leaves the old file (see `harness.claim.still_held`).
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        last_look()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_record(
    record: Record, folder: Path, last_look: Callable[[], None] = lambda: None
) -> Path:
    """Write `record` into `folder` (made if missing) and return the path of the file.

    `last_look` is that of `write_atomically`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    payload = redacted(asdict(record))
    document = {"digest": digest(payload), "record": payload}
    path = folder / FILE_NAME
    content = json.dumps(document, ensure_ascii=False, indent=1).encode()
    write_atomically(path, content, last_look)
    return path


def read_record(folder: Path) -> Record:
    """Read the record in `folder`.

    Raises:
        FileNotFoundError: there is none.
        RecordError: it is damaged or of another schema; the sentence says which.
    """
    path = folder / FILE_NAME
    try:
        document = check.read_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is not a record: {error}") from error
    payload = document.get("record") if isinstance(document, dict) else None
    if not isinstance(payload, dict):
        raise RecordError(f"{path} is not a record: it has no 'record' object")
    if payload.get("schema") != SCHEMA:
        raise RecordError(
            f"{path} has schema {check.shown(payload.get('schema'))}; this version reads schema "
            f"{SCHEMA}"
        )
    # JSON turns tuples into lists; the digest was taken over tuples, whose JSON is the same.
    if document.get("digest") != digest(payload):
        raise RecordError(f"{path} is damaged: its digest does not match its content")
    return _from_payload(payload, path)


def read_records(runs_dir: Path) -> tuple[list[Record], list[str]]:
    """Read the records under `runs_dir`, sorted by cell, and the sentences of those unreadable."""
    records: list[Record] = []
    problems: list[str] = []
    for path in sorted(runs_dir.glob(f"*/{FILE_NAME}")):
        try:
            records.append(read_record(path.parent))
        except RecordError as error:
            problems.append(str(error))
    return records, problems


# A digest says that a record is as it was written, not that a program of ours wrote it.
_FREE = dict.fromkeys(("environment", "details"), check.mapping)
_VALUE: dict[str, check.Check] = {
    **dict.fromkeys(("measure", "metric", "protocol", "unit"), check.text),
    "value": check.number,
    "higher_is_better": check.nothing_or(check.flag),
}
_OF_VALUE = {"stderr": check.nothing_or(check.number), "samples": check.numbers}
_FAILURE = dict.fromkeys(("stage", "kind", "message"), check.text)
_RECORD: dict[str, check.Check] = {
    "cell": check.plain_name,
    "status": lambda found: found in get_args(Status),
    "config": check.mapping,
    "values": lambda found: type(found) is list,
    "errors": lambda found: type(found) is list,
}
_OF_RECORD = {**_FREE, "started": check.text, "seconds": check.number, "schema": check.whole}


def _from_payload(payload: Mapping[str, Any], path: Path) -> Record:
    parts: list[tuple[str, Any, Mapping[str, check.Check], Mapping[str, check.Check]]]
    parts = [("it", payload, _RECORD, _OF_RECORD)]
    parts += [("a value", value, _VALUE, _OF_VALUE) for value in _entries(payload, "values")]
    parts += [("an error", error, _FAILURE, {}) for error in _entries(payload, "errors")]
    for name, found, wanted, optional in parts:
        wrong = check.misfit(found, wanted, optional)
        if wrong is not None:
            raise RecordError(f"{path} is not a record of schema {SCHEMA}: {name} {wrong}")
    values = tuple(
        Value(**{**value, "samples": tuple(value.get("samples", ()))})
        for value in payload["values"]
    )
    errors = tuple(Failure(**error) for error in payload["errors"])
    return Record(**{**payload, "values": values, "errors": errors})


def _entries(payload: Mapping[str, Any], key: str) -> list[Any]:
    found = payload.get(key)
    return found if type(found) is list else []
