"""rtn with INT8 activations: exact integers, artefacts, kernels chosen, labels, bad options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.record import Record
from kernels import compiler
from kernels.errors import ConfigError
from kernels.reference import dequantize_packed
from kernels.stored import Stored
from methods import rtn_activations
from methods.affine import Affine, dequantize, quantize
from methods.base import Matrix, TwoPathMethod
from methods.linear import Layout
from methods.packed import compare_paths
from methods.rtn import RTN
from methods.rtn_activations import NOTE, TokenLinear, integer_kernel, integer_linear
from reports.gather import make_rows
from tests.architectures import tiny, tiny_ids
from tests.methods.machine import Machine

BITS = (8, 4, 3, 2)
OUT, WIDTH, GROUP = 8, 64, 16


def rtn(bits: int = 8, group_size: int = -1, **options: Any) -> RTN:
    return RTN("rtn", bits, group_size, **{"activation_bits": 8, **options})


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_hand(x: Tensor, weight: Tensor, affine: Affine) -> list[float]:
    """Return one token's outputs with Python's own integers, a sum of them for each group."""
    found = quantize("w", weight, affine)
    step = max(abs(float(value)) for value in x) / 127
    codes = [round(float(value) / step) for value in x]
    size = WIDTH if affine.group_size == -1 else affine.group_size
    outputs = []
    for row in range(weight.shape[0]):
        total = 0.0
        for group, scale in enumerate(found.scale[row].tolist()):
            middle = 2 ** (affine.bits - 1)
            zero = middle if found.zero_point is None else int(found.zero_point[row, group])
            inside = range(group * size, group * size + size)
            total += scale * sum((int(found.codes[row, i]) - zero) * codes[i] for i in inside)
        outputs.append(step * total)
    return outputs


def linear_of(affine: Affine, weight: Tensor, bias: Tensor | None = None) -> TokenLinear:
    matrix = Matrix("m", "block", *weight.shape)
    layout = Layout.of(matrix, affine)
    if bias is not None:
        layout = Layout(**{**vars(layout), "bias": "float32"})
    module = TokenLinear(layout)
    module.fill(quantize("m", weight, affine), bias)
    module.prepare("m", Machine(), packed=False)
    return module


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [GROUP, -1])
@pytest.mark.parametrize("bits", BITS)
def test_the_sums_are_those_of_integers(bits: int, group_size: int, symmetric: bool) -> None:
    affine = Affine(bits, group_size, symmetric)
    weight, x = drawn(OUT, WIDTH), 3 * drawn(4, WIDTH)
    expected = torch.tensor([by_hand(token, weight, affine) for token in x], dtype=torch.float64)
    y = integer_linear(x, dequantize(quantize("w", weight, affine)))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)
    bias = drawn(OUT)
    whole = linear_of(affine, weight, bias)(x)
    torch.testing.assert_close(whole, (expected + bias).float(), rtol=1e-5, atol=1e-6)


def test_a_token_does_not_depend_on_the_others() -> None:
    module = linear_of(Affine(4, GROUP), drawn(OUT, WIDTH))
    x = drawn(5, WIDTH)
    alone = torch.cat([module(token[None]) for token in x])
    assert torch.equal(module(torch.cat([x, 1000 * x])), torch.cat([alone, module(1000 * x)]))
    assert torch.equal(module(torch.zeros(1, WIDTH)), torch.zeros(1, OUT))
    assert module(x.bfloat16()).dtype == torch.bfloat16


def rounded(model: Any, method: RTN) -> Any:
    """Return `model` with rounded weights, every linear map of its blocks rounding its tokens."""
    for matrix in method.select(model)[0]:
        linear = model.get_submodule(matrix.name)
        weight = dequantize(quantize(matrix.name, linear.weight.detach(), method.affine))

        def forward(x: Tensor, weight: Tensor = weight) -> Tensor:
            return integer_linear(x, weight).to(x.dtype)

        linear.forward = forward
    return model


@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, 16), (3, 16), (2, -1)])
def test_the_loaded_artefact_is_the_rounded_model(
    bits: int, group_size: int, tmp_path: Path
) -> None:
    method = rtn(bits, group_size)
    report = method.quantize(tiny("llama"), None, None, tmp_path)
    assert report.notes == [NOTE]
    engine = method.load_dequantized(tmp_path, Machine())
    expected = rounded(tiny("llama"), method)(input_ids=tiny_ids()).logits
    torch.testing.assert_close(engine.prefill(tiny_ids())[0], expected, rtol=1e-4, atol=1e-4)
    assert {use.execution for use in engine.kernels()} == {"dequantized"}
    plain = rtn(bits, group_size, activation_bits=None).load_dequantized(tmp_path, Machine())
    assert not torch.equal(plain.prefill(tiny_ids())[0], engine.prefill(tiny_ids())[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, 32), (4, -1), (3, 32), (2, 16)])
def test_both_paths_agree_and_say_what_ran(
    bits: int, group_size: int, dtype: str, tmp_path: Path
) -> None:
    method, machine = rtn(bits, group_size), Machine(compute_dtype=dtype)
    method.quantize(tiny("llama"), None, None, tmp_path)
    engine, other = method.load(tmp_path, machine), method.load_dequantized(tmp_path, machine)
    assert isinstance(method, TwoPathMethod)
    compare_paths(engine, other, tiny_ids(), method.path_tolerance)
    linear, remark = integer_kernel("m", bits, group_size, False, machine)
    for use in engine.kernels():
        assert use.layer == "TokenLinear"
        assert use.execution == ("dequantized" if linear is None else "packed")
        assert remark in use.kernel
        assert ("INT8 per token" in use.kernel) == (linear is None)
    assert not engine.couples_rows  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{"head": True}, {"head": True, "embeddings": True}], ids=str)
def test_the_head_is_a_linear_map_and_the_embedding_is_none(
    options: dict[str, bool], tmp_path: Path
) -> None:
    method = rtn(8, **options)
    method.quantize(tiny("llama"), None, None, tmp_path)
    layers = {use.name: use.layer for use in method.load(tmp_path, Machine()).kernels()}
    assert layers["lm_head"] == "TokenLinear"
    assert layers.get("model.embed_tokens", "QuantizedEmbedding") == "QuantizedEmbedding"


def test_stacks_of_experts_keep_their_activations_and_it_is_said(tmp_path: Path) -> None:
    method = rtn(8)
    report = method.quantize(tiny("mixtral"), None, None, tmp_path)
    assert "stacks of experts" in report.notes[0]
    engine = method.load(tmp_path, Machine())
    assert {use.layer for use in engine.kernels()} == {"TokenLinear", "QuantizedExperts"}
    assert torch.isfinite(engine.prefill(tiny_ids())[0]).all()


class Stand(nn.Module):
    """A kernel that takes groups of 32."""

    kernel = "stand"
    dtypes = (torch.float32,)

    @staticmethod
    def refusal(group_size: int) -> str | None:
        return None if group_size == 32 else f"takes no groups of {group_size}"

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.weight = dequantize_packed(
            stored.packed,
            stored.scale,
            stored.zero_point,
            stored.bits,
            stored.group_size,
            stored.columns,
        )

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = integer_linear(x, self.weight).to(x.dtype)
        return y if bias is None else y + bias


def test_a_kernel_is_used_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtn_activations, "_kernels", lambda device: ({4: Stand}, ""))
    method = rtn(4, 32)
    method.quantize(tiny("llama"), None, None, tmp_path)
    engine, other = method.load(tmp_path, Machine()), method.load_dequantized(tmp_path, Machine())
    assert {(use.kernel, use.execution) for use in engine.kernels()} == {("stand", "packed")}
    compare_paths(engine, other, tiny_ids(), 1e-5)
    model: Any = engine.model  # type: ignore[attr-defined]
    assert model.model.layers[0].mlp.up_proj.packed is None
    assert integer_kernel("m", 4, 16, True, Machine()) == (None, "stand takes no groups of 16")
    assert integer_kernel("m", 3, 16, True, Machine()) == (
        None,
        "no integer kernel for 3 bits on cpu",
    )
    with pytest.raises(ConfigError, match=r"stand takes no groups of 16, .*another group_"):
        rtn(4, 16).check(Machine(allow_fallback=False))


def test_a_card_takes_symmetric_rows_and_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "unavailable", lambda: None)
    card = Machine("cuda", "bfloat16", allow_fallback=False)
    linear, remark = integer_kernel("m", 8, -1, True, card)
    assert (getattr(linear, "kernel", None), remark) == ("quantbench::w8a8_linear", "")
    with pytest.raises(ConfigError, match=r"takes no zero points, .* method\.symmetric"):
        rtn(8).check(card)
    with pytest.raises(ConfigError, match=r"takes activations of 16 bits, .*compute_dtype"):
        rtn(8, symmetric=True).check(Machine("cuda", allow_fallback=False))
    assert integer_kernel("m", 8, -1, True, Machine("cuda"))[1] == "bfloat16 activations"
    assert integer_kernel("m", 4, 32, True, card) == (None, "no integer kernel for 4 bits on cuda")


def test_labels_say_that_activations_are_rounded() -> None:
    def record(name: str, bits: float | None, **options: Any) -> Record:
        config = {
            "model": "m",
            "method": name,
            "bits": bits,
            "group_size": None if bits is None else 128,
            "hardware": "cpu",
            "suite": "smoke",
            "baseline": "rtn",
            "resolved": {"method": options, "baseline": {"activation_bits": None}},
        }
        return Record(name, "ok", config, (), (), {}, {}, "", 0.0)

    rows = make_rows(
        [
            record("rtn", 4, activation_bits=8),
            record("rtn", 4, activation_bits=None),
            record("rptq", 4, activation_bits=4),
            record("bitnet", None, activation_bits=8),
        ]
    )
    labels = {row.label: (row.method, row.is_baseline) for row in rows}
    assert labels == {
        "rtn W4A8 g128": ("rtn A8", False),
        "rtn 4 bits g128": ("rtn", True),
        "rptq W4A4 g128": ("rptq A4", False),
        "bitnet A8": ("bitnet A8", False),
    }


@pytest.mark.parametrize("bits", [4, 16, "8", True])
def test_other_bits_are_one_sentence(bits: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        rtn(activation_bits=bits)
    assert "must be 8, or null for activations in floating point" in str(caught.value)
