"""Artefacts on disk: one folder per artefact key, complete or absent, verified before use.

Torch-free: the driver asks whether an artefact is there, the children write and read it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import json_file as check
from harness.record import digest

MANIFEST = "manifest.json"
FORMAT = 4
BLOCK_BYTES = 1 << 20


class ArtefactError(ValueError):
    """An artefact that is damaged or incomplete; it is made again, never measured."""


@dataclass(frozen=True)
class Manifest:
    """What was written, by whom, and what it cost.

    Attributes:
        files: name -> {"bytes", "sha256"} of every file of the artefact.
        matrices: the quantized matrices as dictionaries of `methods.base.Matrix`.
        stored_bits: all bits stored for them.
        left_out: (name, weights, reason) of every other parameter.
        quantize_seconds: from the loaded model to the written files; None where nothing was
            quantized here, or other cells ran on the device meanwhile.
        quantize_peak_bytes: most memory the child took beyond what it started with; None where
            nothing was quantized here.
        model: facts of the unquantized model (parameters, architecture, tied embeddings).
        calibration: what was calibrated on; None without calibration.
        unquantized: the floating type of all weights where nothing was quantized, else None.
        details: what the method says of its work beside that, as JSON.
    """

    files: dict[str, dict[str, Any]]
    method: str
    bits: float | None
    group_size: int | None
    matrices: list[dict[str, Any]]
    stored_bits: int
    left_out: list[list[Any]]
    notes: list[str]
    quantize_seconds: float | None
    quantize_peak_bytes: int | None
    model: dict[str, Any]
    calibration: dict[str, Any] | None
    unquantized: str | None
    details: dict[str, Any]
    format: int = FORMAT


def training_state(artefact: Path) -> Path:
    """Return the folder where a method that trains keeps what an ended attempt has reached."""
    return artefact.with_name(f"{artefact.name}.training")


def file_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file of `folder` except the manifest."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def sha256(path: Path) -> str:
    """Return the SHA-256 hex digest of a file."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def publish(temporary: Path, folder: Path, manifest: Manifest) -> None:
    """Turn the written folder `temporary` into the artefact `folder`, whole or not at all.

    An artefact that is there and verifies stays: somebody who took the work over may be reading it.
    """
    payload = manifest.__dict__
    document = {"digest": digest(payload), "manifest": payload}
    (temporary / MANIFEST).write_text(json.dumps(document, indent=1))
    for path in temporary.rglob("*"):
        if path.is_file():
            _sync(path)
    while not _renamed(temporary, folder):
        try:
            verify(folder)
            return
        except ArtefactError:
            with suppress(FileNotFoundError):
                shutil.rmtree(folder)
    _sync(folder.parent)


def _renamed(temporary: Path, folder: Path) -> bool:
    """Rename a folder, if nothing is in the place; return whether that was so."""
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artefact.

    Raises:
        ArtefactError: it is missing, damaged or of another format, or names a file that is not in
            the artefact.
    """
    path = folder / MANIFEST
    try:
        document = check.read_json(path)
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{folder} holds no readable manifest: {error}") from error
    payload = document.get("manifest") if isinstance(document, dict) else None
    if not isinstance(payload, dict):
        raise ArtefactError(f"{folder} holds no readable manifest: it has no 'manifest' object")
    if document.get("digest") != digest(payload):
        raise ArtefactError(f"{path} is damaged: its digest does not match")
    if payload.get("format") != FORMAT:
        raise ArtefactError(f"{path} has format {check.shown(payload.get('format'))}, not {FORMAT}")
    wrong = check.misfit(payload, _MANIFEST, {})
    if wrong is not None:
        raise ArtefactError(f"{path} is no manifest of format {FORMAT}: it {wrong}")
    return Manifest(**payload)


def _files(found: Any) -> bool:
    """Whether it is name -> facts of files below the artefact's folder."""
    return type(found) is dict and all(
        check.inner_path(name) and check.misfit(facts, _FILE, {}) is None
        for name, facts in found.items()
    )


def _left_out(found: Any) -> bool:
    return type(found) is list and len(found) == 3 and tuple(map(type, found)) == (str, int, str)


_FILE: dict[str, check.Check] = {"bytes": check.count, "sha256": check.text}
_MANIFEST: dict[str, check.Check] = {
    "files": _files,
    "method": check.text,
    "bits": check.nothing_or(check.number),
    "group_size": check.nothing_or(check.whole),
    "matrices": check.list_of(check.mapping),
    "stored_bits": check.whole,
    "left_out": check.list_of(_left_out),
    "notes": check.list_of(check.text),
    "quantize_seconds": check.nothing_or(check.number),
    "quantize_peak_bytes": check.nothing_or(check.whole),
    "model": check.mapping,
    "calibration": check.nothing_or(check.mapping),
    "unquantized": check.nothing_or(check.text),
    "details": check.mapping,
    "format": check.whole,
}


def verify(folder: Path) -> Manifest:
    """Return the manifest after checking every file against it.

    Raises:
        ArtefactError: a file is missing, truncated, changed, or a link to somewhere else.
    """
    manifest = read_manifest(folder)
    inside = folder.resolve()
    for name, facts in manifest.files.items():
        path = folder / name
        try:
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise ArtefactError(f"{path} is missing or truncated")
            if not path.resolve().is_relative_to(inside):
                raise ArtefactError(f"{path} is a link to outside the artefact")
            found = sha256(path)
        except OSError as error:
            raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error
        if found != facts["sha256"]:
            raise ArtefactError(f"{path} is damaged: its digest does not match the manifest")
    return manifest
