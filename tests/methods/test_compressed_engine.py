"""The modules that run compressed-tensors weights, and loading checkpoints that others made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernels.errors import ConfigError
from methods.compressed_engine import codes_of, load, load_dequantized
from methods.compressed_layers import Fp8Linear, Int8Linear, fp8_values, token_scale
from methods.compressed_oneshot import OneShot, select_linears
from methods.packed import compare_paths
from tests.architectures import tiny_ids, write_checkpoint
from tests.methods.compressed_models import by_row, half, symmetric_int8, tensors_of
from tests.methods.machine import Machine

EXACT = 1e-6
BFLOAT16 = 0.02
"""This project's packed kernels round activations and results to bfloat16."""


class Weights:
    """A scheme of weights alone, as `OneShot.quantize` reads it."""

    activations = "none"

    def __init__(self, **weights: Any) -> None:
        self.weights = weights

    def config(self) -> dict[str, Any]:
        return {"targets": ["Linear"], "weights": {"type": "int", **self.weights}}


def checkpoint(folder: Path, kind: str = "qwen2", **weights: Any) -> Path:
    """Write a checkpoint that llm-compressor made with another scheme than the methods here."""
    model: Any = half(kind)
    run = OneShot("a test", model, None, None)
    with run.session():
        scheme: Any = Weights(**weights)
        run.quantize(scheme, select_linears(model, ()).matrices)
        run.save(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
def test_every_fp8_code_is_decoded_as_pytorch_does(dtype: torch.dtype, to: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8).view(dtype)
    codes = codes[codes.float().isfinite()]
    assert len(codes) >= 248
    values, factor = fp8_values(codes, to)
    assert values.dtype == to
    assert torch.equal(values.float() * factor, codes.float())


def test_token_scales() -> None:
    x = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    scale = token_scale(x, 127.5)
    assert torch.equal(scale, torch.tensor([[3 / 127.5], [torch.finfo(torch.float32).eps]]))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "out", "width"), [(1, 1, 1), (1, 64, 64), (3, 33, 65), (40, 7, 9)]
)
def test_int8_against_an_integer_reference(
    rows: int, out: int, width: int, bias: bool, fixed: bool
) -> None:
    generator = torch.Generator().manual_seed(rows * out + width)
    weight = torch.randint(-128, 128, (out, width), dtype=torch.int8, generator=generator)
    scale = torch.rand(out, 1, generator=generator) * 0.01 + 1e-3
    x = torch.randn(rows, width, generator=generator)
    offset = torch.randn(out, generator=generator) if bias else None
    layer = Int8Linear(weight, scale, torch.tensor([0.015]) if fixed else None, offset)
    step = torch.tensor(0.015) if fixed else x.abs().amax(1, keepdim=True) / 127.5
    q = (x / step).round().clamp(-128, 127).long()
    expected = (q @ weight.long().T).double() * step.double() * scale.double().T
    expected = expected if offset is None else expected + offset
    for dequantized in (False, True):
        layer.dequantized = dequantized
        found = layer(x)
        assert float((found - expected).abs().max()) < EXACT * float(expected.abs().max())


def test_sums_do_not_saturate() -> None:
    """Largest inputs times largest weights, where 16-bit sums would clip."""
    layer = Int8Linear(torch.full((16, 4096), -128).to(torch.int8), torch.ones(16), None, None)
    found = layer(torch.full((2, 4096), -1.0)) * 127.5
    torch.testing.assert_close(found, torch.full((2, 16), 128.0 * 127 * 4096), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leading_dimensions_strides_and_types_are_free(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator)
    x = torch.randn(32, 5, 3, generator=generator).permute(2, 1, 0).to(dtype)
    layers: list[nn.Module] = [
        Int8Linear(weight.mul(40).round().to(torch.int8), torch.ones(24), None, torch.ones(24)),
        Fp8Linear(weight.to(torch.float8_e4m3fn), torch.ones(24), "dynamic", None, torch.ones(24)),
        Fp8Linear(weight.to(torch.float8_e5m2), torch.ones(1), "none", None, None),
    ]
    for layer in layers:
        y = layer(x)
        assert (y.shape, y.dtype) == ((3, 5, 24), dtype)
        torch.testing.assert_close(y, layer(x.reshape(15, 32)).reshape(3, 5, 24))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_codes_are_read_as_the_library_writes_them(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 70), generator=generator)
    words = pack_to_int32(q.to(torch.int8), bits)
    assert torch.equal(codes_of(words, bits, 70).long(), q + 2 ** (bits - 1))


@pytest.mark.parametrize(
    ("weights", "execution", "tolerance"),
    [
        ({"num_bits": 4, "symmetric": True, "strategy": "channel"}, "packed", BFLOAT16),
        (
            {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32},
            "packed",
            BFLOAT16,
        ),
        (
            {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": 16},
            "dequantized",
            EXACT,
        ),
        ({"num_bits": 8, "symmetric": True, "strategy": "channel"}, "packed", BFLOAT16),
        # No module here has seven bits.
        ({"num_bits": 7, "symmetric": True, "strategy": "channel"}, "simulated", EXACT),
    ],
    ids=lambda value: str(value),
)
def test_packed_integers(
    weights: dict[str, Any], execution: str, tolerance: float, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, **weights)
    assert "model.layers.0.mlp.up_proj.weight_packed" in tensors_of(folder)
    engine, other = load(folder, Machine()), load_dequantized(folder, Machine())
    assert len(engine.kernels()) == 14
    assert {use.execution for use in engine.kernels()} == {execution}
    assert {use.execution for use in other.kernels()} == {"simulated"}
    compare_paths(engine, other, tiny_ids(), tolerance)


def test_a_packed_path_is_no_silent_fallback(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 16}
    folder = checkpoint(tmp_path, **weights)
    assert {use.execution for use in load(folder, Machine()).kernels()} == {"dequantized"}
    with pytest.raises(ConfigError, match="allow_fallback is false"):
        load(folder, Machine(compute_dtype="bfloat16", allow_fallback=False))


def test_bfloat16_leaves_stored_bytes_alone(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, num_bits=8, type="float", symmetric=True, strategy="channel")
    engine: Any = load(folder, Machine(compute_dtype="bfloat16"))
    layer = engine.model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert engine.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_flat_tokens_are_rounded_one_by_one_by_the_library(tmp_path: Path) -> None:
    """OPT's MLP reads [tokens, in], which compressed-tensors alone gives one scale in all."""
    from methods.w8a8 import W8A8

    W8A8("w8a8").quantize(half("opt"), None, None, tmp_path)
    engine: Any = load_dequantized(tmp_path, Machine())
    module = engine.model.model.decoder.layers[0].fc1
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-2, 2, 6)[:, None]
    rounded = symmetric_int8(x, by_row(x))
    expected = nn.functional.linear(rounded, module.weight, module.bias)
    assert module(x).shape == (6, 64)
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x[None]), expected[None])


def test_stacks_of_experts_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "mixtral")
    with pytest.raises(ConfigError, match="is a stack of experts"):
        load(tmp_path, Machine())


def test_importing_the_methods_does_not_import_the_libraries() -> None:
    code = (
        "import sys; import methods.w8a8, methods.fp8, methods.smoothquant, "
        "methods.compressed_engine; "
        "print([n for n in ('llmcompressor', 'compressed_tensors', 'loguru') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
