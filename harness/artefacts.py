"""Artefacts on disk: one folder per artefact key, complete or absent, verified before use.

Torch-free: the driver asks whether an artefact is there, the children write and read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.record import digest

MANIFEST = "manifest.json"
FORMAT = 3
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
            quantized here.
        quantize_peak_bytes: most memory the child took beyond what it started with.
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
    quantize_peak_bytes: int
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
    """Turn the written folder `temporary` into the artefact `folder`, whole or not at all."""
    payload = manifest.__dict__
    document = {"digest": digest(payload), "manifest": payload}
    (temporary / MANIFEST).write_text(json.dumps(document, indent=1))
    for path in temporary.rglob("*"):
        if path.is_file():
            _sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artefact.

    Raises:
        ArtefactError: it is missing, damaged or of another format.
    """
    try:
        document = json.loads((folder / MANIFEST).read_bytes())
        payload = document["manifest"]
        if document["digest"] != digest(payload):
            raise ArtefactError(f"{folder / MANIFEST} is damaged: its digest does not match")
        if payload["format"] != FORMAT:
            raise ArtefactError(f"{folder / MANIFEST} has format {payload['format']}, not {FORMAT}")
        return Manifest(**payload)
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtefactError(f"{folder} holds no readable manifest: {error}") from error


def verify(folder: Path) -> Manifest:
    """Return the manifest after checking every file against it.

    Raises:
        ArtefactError: a file is missing, truncated or changed.
    """
    manifest = read_manifest(folder)
    for name, facts in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise ArtefactError(f"{path} is missing or truncated")
        if sha256(path) != facts["sha256"]:
            raise ArtefactError(f"{path} is damaged: its digest does not match the manifest")
    return manifest
