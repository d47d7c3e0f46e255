"""Artefacts of rtn as GPTQ and AWQ checkpoints: GPTQModel loads them and computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.errors import ConfigError
from methods.artefact import LAYERS, WEIGHTS
from methods.export import export, main, pack_words
from methods.gptq_format import matrices, scheme_of, unpack
from methods.gptqmodel_engine import load, load_dequantized
from methods.packed import compare_paths
from methods.repack import repack
from methods.rtn import RTN
from tests.architectures import tiny, tiny_tokenizer
from tests.methods.gptq_models import build, calibration_text
from tests.methods.machine import Machine

Case = tuple[str, int, int, bool, str, float]
CASES: list[Case] = [
    # format, bits, group size, symmetric, version, difference of GPTQModel's kernel: as large as
    # its activations in bfloat16 make it, or the weights in float16
    ("gptq", 4, 32, False, "gptq_v2", 0.02),
    ("gptq", 3, -1, True, "gptq", 0.002),
    ("gptq", 2, 16, False, "gptq_v2", 0.002),
    ("gptq", 8, -1, True, "gptq", 0.002),
    ("awq", 4, 32, False, "gemm", 0.02),
    ("awq", 4, -1, True, "gemm", 0.002),
]
KEPT = "model.layers.0.mlp.down_proj"


def rtn(bits: int = 4, group_size: int = 32, **options: Any) -> RTN:
    return RTN("rtn", bits, group_size, **options)


def made(method: RTN, folder: Path, kind: str = "llama") -> Path:
    method.quantize(build(kind), None, None, folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_what_is_unpacked(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 96), generator=torch.Generator().manual_seed(bits))
    words = pack_words(codes, bits)
    assert (words.dtype, words.shape) == (torch.int32, (5, 96 * bits // 32))
    assert torch.equal(unpack(words, bits), codes)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gptqmodel_computes_what_the_artefact_does(case: Case, tmp_path: Path) -> None:
    kind, bits, size, symmetric, version, tolerance = case
    method = rtn(bits, size, symmetric=symmetric, keep=[KEPT])
    artefact = made(method, tmp_path / "artefact")
    into = tmp_path / "into"
    assert main([str(artefact), str(into), "--format", kind]) == 0
    scheme = scheme_of(into)
    found = (scheme.kind, scheme.version, scheme.bits, scheme.group_size, scheme.symmetric)
    assert found == (kind, version, bits, size, symmetric)
    assert len(matrices(into)) == 13
    ids = calibration_text()[:2]
    ours = method.load_dequantized(artefact, Machine())
    # By our own reading of the format, bit for bit the same weights.
    assert torch.equal(load_dequantized(into, Machine()).prefill(ids)[0], ours.prefill(ids)[0])
    engine = load(into, Machine())
    compare_paths(engine, ours, ids, tolerance)
    assert {use.name for use in engine.kernels()} == {m.name for m in matrices(into)}
    assert (into / "tokenizer.json").is_file()
    assert not (into / "manifest.json").exists()


def test_exported_and_repacked_it_is_the_same_artefact(tmp_path: Path) -> None:
    for kind in ("gptq", "awq"):
        method = rtn(4, 32, symmetric=kind == "awq")
        artefact = made(method, tmp_path / kind)
        export(artefact, tmp_path / f"{kind}_into", "gptq" if kind == "gptq" else "awq")
        repack(tmp_path / f"{kind}_into", tmp_path / f"{kind}_again")
        again = tmp_path / f"{kind}_again"
        assert (again / WEIGHTS).read_bytes() == (artefact / WEIGHTS).read_bytes()
        facts = [json.loads((folder / LAYERS).read_text()) for folder in (again, artefact)]
        assert facts[0] == facts[1]


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2", "gpt2"])
def test_ties_biases_and_transposed_matrices(kind: str, tmp_path: Path) -> None:
    method = rtn(4, 32, symmetric=True)
    artefact = made(method, tmp_path / "artefact", kind)
    export(artefact, tmp_path / "into", "gptq")
    ids = calibration_text()[:2]
    compare_paths(
        load(tmp_path / "into", Machine()), method.load_dequantized(artefact, Machine()), ids, 0.02
    )


@pytest.mark.parametrize(
    ("method", "model", "kind", "sentence"),
    [
        (rtn(3), "llama", "awq", "has 3 bits, and the awq format has 4; use --format gptq"),
        (rtn(scale_dtype="float32"), "llama", "gptq", "quantize with method.scale_dtype=float16"),
        (rtn(group_size=48, on_indivisible="pad"), "llama", "gptq", "64 inputs are padded to 96"),
        (rtn(embeddings=True), "llama", "gptq", "embed_tokens is an embedding"),
        (rtn(), "mixtral", "gptq", "is a stack of experts, and the gptq format holds linear maps"),
        (rtn(head=True), "llama", "gptq", "is the head, .* method.head=false"),
    ],
)
def test_what_a_format_cannot_hold_is_one_sentence(
    method: RTN, model: str, kind: Any, sentence: str, tmp_path: Path
) -> None:
    artefact = made(method, tmp_path / "artefact", model)
    with pytest.raises(ConfigError, match=sentence) as caught:
        export(artefact, tmp_path / "into", kind)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "into").exists()


def test_narrow_matrices_and_strange_folders_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), str(tmp_path / "into"), "--format", "gptq"]) == 2
    assert "is no artefact of this project" in capsys.readouterr().err
    rtn(4, -1).quantize(tiny("llama"), None, None, tmp_path / "narrow")
    with pytest.raises(ConfigError, match="is 16 x 32; the gptq format packs both widths"):
        export(tmp_path / "narrow", tmp_path / "into", "gptq")
    layers = json.loads((tmp_path / "narrow" / LAYERS).read_text())
    layers["layers"] = {name: {"layer": "linear"} for name in layers["layers"]}
    (tmp_path / "narrow" / LAYERS).write_text(json.dumps(layers))
    with pytest.raises(ConfigError, match="is not stored as method=rtn stores matrices"):
        export(tmp_path / "narrow", tmp_path / "into", "gptq")
