"""The packed modules: buffers, facts, the choice of a kernel, and what they compute."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import choice, compiler, host_build
from kernels.errors import ConfigError
from kernels.host_build import unavailable
from methods.affine import Affine, dequantize, quantize
from methods.base import Matrix, Role
from methods.engine import TorchEngine
from methods.linear import (
    Layout,
    QuantizedEmbedding,
    QuantizedModule,
    empty,
    module_of,
    packed_kernel,
)
from tests.architectures import tiny
from tests.methods.machine import Machine

BITS = (8, 4, 3, 2)
FORMATS = [
    Affine(bits, group_size, symmetric, per_tensor)
    for bits in BITS
    for group_size, per_tensor in ((-1, False), (-1, True), (16, False), (32, False))
    for symmetric in (True, False)
]


def module(
    affine: Affine,
    out: int = 24,
    width: int = 80,
    count: int = 1,
    role: Role = "block",
    bias: bool = False,
) -> tuple[QuantizedModule, Tensor, Tensor | None]:
    """Return a filled module, the float32 weight it stands for, and its bias."""
    generator = torch.Generator().manual_seed(out + width)
    stack = (count,) if count > 1 else ()
    weight = torch.randn(*stack, out, width, generator=generator)
    quantized = quantize("w", weight, affine)
    layout = Layout.of(Matrix("w", role, out, width, count), affine)
    values = torch.randn(out, generator=generator) if bias else None
    if bias:
        layout = replace(layout, bias="float32")
    return module_of(layout).fill(quantized, values), dequantize(quantized), values


def relative(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


@pytest.mark.parametrize("affine", FORMATS, ids=str)
def test_stored_bits_are_those_of_the_buffers(affine: Affine) -> None:
    for width in (80, 83):
        filled, _, _ = module(affine, 23, width, bias=True)
        buffers = {name: b for name, b in filled.named_buffers() if name != "bias"}
        assert filled.layout.stored_bits == sum(8 * b.nbytes for b in buffers.values())
        assert set(buffers) <= {"packed", "scale", "zero_point"}
        stack, _, _ = module(affine, 23, width, count=3)
        assert stack.layout.stored_bits == sum(8 * b.nbytes for b in stack.buffers())
        assert stack.layout.stored_bits == 3 * filled.layout.stored_bits


@pytest.mark.parametrize("affine", FORMATS, ids=str)
def test_a_linear_map_by_every_path(affine: Affine) -> None:
    x = torch.randn(2, 5, 83, generator=torch.Generator().manual_seed(1))
    for packed, dtype, tolerance in (
        (False, "float32", 1e-5),
        (True, "float32", 1e-2),
        (True, "bfloat16", 1e-2),
    ):
        filled, weight, bias = module(affine, 23, 83, bias=True)
        assert bias is not None
        filled.prepare("w", Machine(compute_dtype=dtype), packed)
        y = filled(x.to(getattr(torch, dtype)))
        assert y.dtype == getattr(torch, dtype)
        assert y.shape == (2, 5, 23)
        assert relative(y.float(), x @ weight.T + bias) < tolerance


@pytest.mark.parametrize("affine", FORMATS, ids=str)
def test_an_embedding_reads_rows(affine: Affine) -> None:
    filled, weight, _ = module(affine, 40, 83, role="embedding")
    ids = torch.tensor([[0, 39, 7], [7, 1, 2]])
    with_zeros = not affine.symmetric
    if with_zeros:
        with pytest.raises(RuntimeError, match="prepared"):
            filled(ids)
    filled.prepare("w", Machine())
    filled.prepare("w", Machine())  # a second time changes nothing
    torch.testing.assert_close(filled(ids), weight[ids], rtol=1e-6, atol=0)
    assert isinstance(filled, QuantizedEmbedding)
    filled.prepare("w", Machine(compute_dtype="bfloat16"))
    assert filled(ids).dtype == torch.bfloat16
    assert filled.use("w").execution == "dequantized"


@pytest.mark.parametrize("affine", FORMATS, ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_a_stack_gives_each_expert_in_the_models_orientation(
    affine: Affine, transposed: bool
) -> None:
    filled, weight, _ = module(affine, 24, 83, count=3)
    filled.layout = replace(filled.layout, transposed=transposed)
    filled.prepare("w", Machine())
    for index in (0, torch.tensor(2)):
        expected = weight[index].T if transposed else weight[index]
        torch.testing.assert_close(filled[index], expected, rtol=1e-6, atol=0)  # type: ignore[index]


@pytest.mark.parametrize("affine", FORMATS, ids=str)
def test_facts_are_json_and_build_the_module_again(affine: Affine) -> None:
    filled, _, _ = module(affine, bias=True)
    built = empty(json.loads(json.dumps(filled.facts())))
    assert type(built) is type(filled)
    assert all(buffer.is_meta for buffer in built.buffers())
    state = filled.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in built.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    built.load_state_dict(state, strict=True, assign=True)
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(2))
    assert torch.equal(built(x), filled(x))


def test_tensors_that_do_not_fit_their_facts_are_refused() -> None:
    affine = Affine(4, 32)
    layout = Layout.of(Matrix("w", "block", 24, 80), affine)
    with pytest.raises(ValueError, match="do not fit"):
        module_of(layout).fill(quantize("w", torch.ones(24, 64), affine), None)
    with pytest.raises(ValueError, match="do not fit"):
        module_of(layout).fill(quantize("w", torch.ones(24, 80), affine), torch.ones(24))


def test_another_version_of_the_layout_is_refused() -> None:
    facts = module(Affine(4, 32))[0].facts()
    with pytest.raises(ValueError, match="packed layout version 99; this version reads 1"):
        empty({**facts, "version": 99})


PACKED = "packed"
PLAIN = "dequantized"
PANELS = "quantbench::panel_linear (C)"

compiled = pytest.mark.skipif(bool(unavailable()), reason=f"no C kernels: {unavailable()}")


@compiled
@pytest.mark.parametrize(
    ("affine", "execution", "kernel"),
    [
        (Affine(4, 32), PACKED, PANELS),
        (Affine(4, 64, symmetric=True), PACKED, PANELS),
        (Affine(4, -1), PACKED, PANELS),
        (Affine(8, -1), PACKED, PANELS),
        (Affine(8, -1, symmetric=True, per_tensor=True), PACKED, PANELS),
        (Affine(8, 32), PACKED, PANELS),
        (Affine(3, 32), PACKED, PANELS),
        (Affine(2, -1), PACKED, PANELS),
        (
            Affine(4, 48),
            PLAIN,
            f"quantbench::packed_linear ({PANELS} takes no groups of 48 inputs, only multiples of "
            "32 and -1)",
        ),
    ],
    ids=str,
)
def test_the_kernel_that_runs_is_named(affine: Affine, execution: str, kernel: str) -> None:
    filled, _, _ = module(affine, 32, 192)
    filled.prepare("a.b", Machine(compute_dtype="bfloat16"))
    use = filled.use("a.b")
    assert (use.name, use.layer, use.weights) == ("a.b", "QuantizedLinear", 32 * 192)
    assert (use.execution, use.kernel) == (execution, kernel)
    rounded, _, _ = module(affine, 32, 192)
    rounded.prepare("a.b", Machine())
    assert rounded.use("a.b").kernel == kernel, "float32 activations are not rounded to bfloat16"
    forced, _, _ = module(affine, 32, 192)
    forced.prepare("a.b", Machine(), packed=False)
    assert forced.use("a.b").kernel == "quantbench::packed_linear (asked for)"
    assert forced.use("a.b").execution == PLAIN


@compiled
def test_converting_for_the_kernel_drops_what_was_stored() -> None:
    filled, _, _ = module(Affine(4, 32), 64, 256)
    stored = sum(buffer.nbytes for buffer in filled.buffers())
    filled.prepare("w", Machine())
    names = {name for name, _ in filled.named_buffers()}
    assert names == {"linear.weight", "linear.scale", "linear.zero_point"}
    # Zero points take a byte in place of 4 bits.
    assert sum(b.nbytes for b in filled.buffers()) == stored + 64 * 8 * 4 // 8
    with pytest.raises(RuntimeError, match="dropped"):
        filled.stored()


@pytest.mark.parametrize(
    ("bits", "kernel", "remark"),
    [
        (4, "aten::_weight_int4pack_mm_for_cpu", "(bfloat16 activations; no compiler today)"),
        (8, "aten::_weight_int8pack_mm", "(bfloat16 activations; no compiler today)"),
        (3, "quantbench::packed_linear", "(no packed kernel for 3 bits on cpu: no compiler today)"),
    ],
)
def test_without_a_compiler_other_kernels_run_and_the_reason_is_given(
    bits: int, kernel: str, remark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_build, "unavailable", lambda: "no compiler today")
    filled, _, _ = module(Affine(bits, -1), 32, 192)
    filled.prepare("w", Machine())
    assert filled.use("w").kernel == f"{kernel} {remark}"
    assert isinstance(filled.in_c(torch.float32), str)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("affine", "dtype", "sentence"),
    [
        (Affine(4, 48), "bfloat16", f"layer.q: {PANELS} takes no groups of 48 inputs"),
        (Affine(2, 48), "float32", f"layer.q: {PANELS} takes no groups of 48 inputs"),
    ],
)
@compiled
def test_a_fallback_that_is_not_allowed_is_an_error(
    affine: Affine, dtype: str, sentence: str
) -> None:
    filled, _, _ = module(affine, 32, 192)
    with pytest.raises(ConfigError, match="allow_fallback is false") as caught:
        filled.prepare("layer.q", Machine(compute_dtype=dtype, allow_fallback=False))
    assert sentence in str(caught.value)


def test_a_device_without_any_kernel_is_no_fallback() -> None:
    filled, _, _ = module(Affine(3, 32))
    filled.prepare("w", Machine(device="mps", allow_fallback=False))
    assert filled.use("w").execution == "dequantized"


def test_a_card_has_kernels_that_round_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "unavailable", lambda: None)
    linear, remark = packed_kernel("w", 3, 64, Machine("cuda", "float16", allow_fallback=False))
    assert (getattr(linear, "kernel", None), remark) == ("quantbench::fragment_linear", "")
    linear, remark = packed_kernel("w", 3, 64, Machine("cuda", "float32"))
    assert (getattr(linear, "kernel", None), remark) == (
        "quantbench::fragment_linear",
        "bfloat16 activations",
    )
    with pytest.raises(ConfigError, match="computes in float16 or bfloat16, not in float32"):
        packed_kernel("w", 3, 64, Machine("cuda", "float32", allow_fallback=False))
    monkeypatch.setattr(compiler, "unavailable", lambda: "no NVRTC")
    assert packed_kernel("w", 3, 64, Machine("cuda", "float16")) == (
        None,
        "no packed kernel for 3 bits on cuda: no NVRTC",
    )


def test_where_the_library_multiplies_many_tokens_the_provenance_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = {"library_from": 64, "seconds": {}}
    monkeypatch.setattr(choice, "choose", lambda matrix, dtype: measured)
    filled, _, _ = module(Affine(4, 32))
    filled.prepare("w", Machine())
    kernel = "quantbench::panel_linear (C), from 64 tokens dequantized for torch's GEMM"
    assert filled.use("w").kernel == kernel
    engine = TorchEngine(tiny("llama"), "cpu", [])
    assert engine.choices == []
    engine.model.quantized = torch.nn.ModuleList([filled, filled])
    assert engine.choices == [measured]
