"""Bitmaps and codes that are not zero: the arithmetic of their size, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.errors import ConfigError
from methods import artefact, sparse
from methods.artefact import WEIGHTS
from methods.bitnet import BitNet
from methods.packed import load_engine
from methods.rtn import RTN
from tests.architectures import tiny, tiny_ids
from tests.methods.machine import Machine


def test_what_the_documents_say_of_pruning_and_int8() -> None:
    """100 MB, 70 MB pruned, 17.5 MB and 5.7x: 100 / 17.5 forgets where the weights were."""
    assert pytest.approx(5.714, abs=1e-3) == 100 / (70 / 4)
    assert sparse.compression(8, 0.3, "dense") == 4
    assert sparse.compression(8, 0.3, "bitmap") == pytest.approx(4.848, abs=1e-3)
    needed = sparse.zeros_needed(100 / 17.5, 8)
    assert needed == pytest.approx(0.425)
    assert sparse.compression(8, needed, "bitmap") == pytest.approx(100 / 17.5)
    # A bitmap pays for itself from one zero in `bits` weights on.
    assert sparse.bits_per_weight(4, 1 / 4, "bitmap") == sparse.bits_per_weight(4, 0.25, "dense")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_no_weight_changes(kind: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    method = RTN("rtn", bits, 24, symmetric, on_indivisible="pad", embeddings=True)
    method.quantize(tiny(kind), None, None, tmp_path)
    dense = load_engine(tmp_path, Machine(), packed=False)
    stored = load_file(tmp_path / WEIGHTS)
    found = sparse.compress(tmp_path)
    compressed = load_engine(tmp_path, Machine(), False, sparse.build)
    assert torch.equal(*(engine.prefill(tiny_ids())[0] for engine in (dense, compressed)))
    for name, module in compressed.model.named_modules():
        if name in found:
            assert torch.equal(module.packed, stored[f"{name}.packed"]), name


def test_the_bits_are_those_of_the_arithmetic(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter[:, ::2] = 0
    RTN("rtn", 8, 32).quantize(model, None, None, tmp_path)
    found = sparse.compress(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    scales = 24 / 32  # a float16 and a zero point for 32 weights
    # No other weight of so few rounds to zero at 8 bits but by chance.
    expected = sparse.bits_per_weight(8, 0.5, "bitmap", scales)
    assert found[name] / (64 * 32) == pytest.approx(expected, rel=0.02)


def test_other_artefacts_are_refused(tmp_path: Path) -> None:
    BitNet("bitnet").quantize(tiny("llama"), None, None, tmp_path / "bitnet")
    with pytest.raises(ConfigError, match=r"method.then wrote others"):
        sparse.compress(tmp_path / "bitnet")
    artefact.save(tiny("llama"), tmp_path / "plain", {})
    with pytest.raises(ConfigError, match="store=bitmap takes weights"):
        sparse.compress(tmp_path / "plain")


def test_a_damaged_bitmap_is_refused(tmp_path: Path) -> None:
    RTN("rtn", 8, 32).quantize(tiny("llama"), None, None, tmp_path)
    sparse.compress(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.bitmap"][0] ^= 1
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="a bitmap marks"):
        load_engine(tmp_path, Machine(), False, sparse.build)
