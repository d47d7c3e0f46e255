"""Artefacts are whole or absent, and damage is found before they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.artefacts import ArtefactError, Manifest, file_facts, publish, verify


def make(folder: Path) -> Path:
    temporary = folder / ".tmp"
    (temporary / "sub").mkdir(parents=True)
    (temporary / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    (temporary / "sub" / "layers.json").write_text("{}")
    manifest = Manifest(
        files=file_facts(temporary),
        method="rtn",
        bits=4,
        group_size=128,
        matrices=[],
        stored_bits=0,
        left_out=[["embed", 3, "outside"]],
        notes=[],
        quantize_seconds=0.5,
        quantize_peak_bytes=7,
        model={},
        calibration=None,
        unquantized=None,
        details={},
    )
    publish(temporary, folder / "artefact", manifest)
    return folder / "artefact"


def test_a_published_artefact_verifies_and_nothing_else_is_left(tmp_path: Path) -> None:
    artefact = make(tmp_path)
    assert verify(artefact).left_out == [["embed", 3, "outside"]]
    assert [path.name for path in tmp_path.iterdir()] == ["artefact"]


def test_publishing_again_replaces(tmp_path: Path) -> None:
    artefact = make(tmp_path)
    (artefact / "model.safetensors").write_bytes(b"broken")
    make(tmp_path)
    assert verify(artefact).bits == 4


@pytest.mark.parametrize("name", ["model.safetensors", "sub/layers.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found(tmp_path: Path, name: str, damage: str) -> None:
    artefact = make(tmp_path)
    path = artefact / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (b"" if damage == "truncate" else b"\x00"))
    with pytest.raises(ArtefactError):
        verify(artefact)
