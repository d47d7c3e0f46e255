"""Every kernel an op can ask for: the list, what is compiled of it here, the table, the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels import build, compiler
from kernels.build import build_all, build_one, main
from kernels.registers import Resources, Row, table
from kernels.variants import ARCHITECTURES, Variant, selection, variants
from tests.kernels.test_build import DEFINES, SAMPLES, compiling


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))


def test_every_source_is_a_variant_of_every_kind() -> None:
    every = variants()
    assert {v.file for v in every} == {path.name for path in compiler.SOURCES.glob("*.cu")}
    some = selection()
    for file in {v.file for v in every}:
        bits = {v.defines.get("BITS") for v in every if v.file == file}
        found = {(v.defines.get("BITS"), v.architectures) for v in some if v.file == file}
        assert found == {(b, (arch,)) for b in bits for arch in ARCHITECTURES}
    for name in ("GROUP", "ZEROS", "DTYPE", "TILES", "TOKEN_TILES", "STAGES", "SYMMETRIC"):
        assert len({v.defines[name] for v in some if name in v.defines}) > 1
    names = {(v.file, v.function, tuple(v.defines.items())) for v in every}
    assert len(names) == len(every)


@compiling
@pytest.mark.parametrize("file", sorted({v.file for v in variants()}))
def test_kernels_compile_everywhere_and_spill_nothing(file: str) -> None:
    """Some of each source; `python -m kernels.build` compiles all."""
    chosen = [v for v in selection() if v.file == file]
    for variant in chosen:
        row = build_one(variant, variant.architectures[0])
        assert row.sound, row.error or f"{row.function} {row.shown} spills for {row.arch}"
    assert len(chosen) >= len(ARCHITECTURES)


@compiling
def test_the_table() -> None:
    variants = [
        (Variant("sample.cu", "reverse", DEFINES), "sm_80"),
        (Variant("sample.cu", "missing", DEFINES), "sm_80"),
        (Variant("sample.cu", "reverse", {}), "sm_80"),
        (Variant("spilling.cu", "spilling"), "sm_80"),
    ]
    rows = [build_one(*pair, SAMPLES) for pair in variants]
    assert [row.sound for row in rows] == [True, False, False, False]
    text = table(rows, "NVRTC 13.0")
    assert "4 kernels, each for one architecture: 3 fail or spill" in text
    assert text.count("1 failed") == 2, text
    assert "| 1 spill, " in text


def test_a_line_of_the_table_is_a_family() -> None:
    def row(arch: str, group: int, registers: int) -> Row:
        defines = {"BITS": 4, "GROUP": group, "TILES": 1}
        return Row("d.cu", "decode", defines, arch, Resources(registers, 0, 0, 0))

    text = table([row("sm_100", 32, 90), row("sm_80", 32, 40), row("sm_80", 64, 50)], "NVRTC")
    assert "| kernel | defines | variants | sm_80 | sm_100 |" in text
    assert "| d.cu: decode | BITS=4 TILES=1 | 2 | 40-50 | 90 |" in text


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[tuple[Variant, str]]] = []
    good = Row("a.cu", "a", {}, "sm_80", Resources(32, 0, 0, 0))
    spilling = Row("b.cu", "b", {"N": 1}, "sm_80", Resources(255, 8, 8, 0))
    rows = [good]

    def compiled(pairs: list[tuple[Variant, str]], jobs: int) -> list[Row]:
        asked.append(pairs)
        return rows

    monkeypatch.setattr(build, "compiler_version", lambda: "NVRTC 13.0")
    monkeypatch.setattr(build, "build_all", compiled)
    assert main(["--output", str(tmp_path / "cards" / "registers.md")]) == 0
    assert capsys.readouterr().out == (tmp_path / "cards" / "registers.md").read_text()
    assert {arch for _, arch in asked[0]} == set(ARCHITECTURES)
    rows = [good, spilling]
    assert main(["--arch", "sm_90"]) == 1
    assert {arch for _, arch in asked[1]} == {"sm_90"}
    assert "b spills for sm_80 with N=1" in capsys.readouterr().err
    rows = []
    assert main([]) == 1, "nothing compiled is nothing shown"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--arch", "card"]) == 1
    assert "needs a CUDA card" in capsys.readouterr().err


@compiling
def test_processes_give_the_same_rows() -> None:
    pairs = [(Variant("unpack.cu", "unpack", {"BITS": bits}), "sm_90") for bits in (4, 8)]
    assert build_all(pairs, 2) == build_all(pairs, 1)
