"""The C kernels: every kind and shape against float64, batches, and both builds."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cpu, host_build, host_linear, reference
from kernels.aten import Int4Linear
from kernels.cpu import INT8_ACTIVATION_LINEARS, PACKED_LINEARS, Int8ActivationLinear, PanelLinear
from kernels.ops import panel_linear
from kernels.stored import Stored
from tests.kernels.test_aten import inputs, stored

pytestmark = pytest.mark.skipif(
    bool(host_build.unavailable()), reason=f"no C kernels: {host_build.unavailable()}"
)

BITS = (8, 4, 3, 2)
TOKENS = (1, 3, 17, 130)
SHAPES = [(64, 256, 128), (33, 172, -1), (80, 320, 160), (20, 172, 64), (1, 1, -1), (130, 96, 32)]
"""Rows, columns, group size: whole and ragged units, groups longer than a slice, padding."""

SUMS = 1e-6
"""Largest error of float32 sums relative to the largest output."""
SPLIT = 2e-5
"""As `SUMS`, with 16 of 24 bits of each activation."""
RESULT = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""What rounding the result to its type adds."""


@pytest.fixture(params=[False, True], ids=["native", "portable"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the library for this processor, then the one without its special instructions."""
    chosen = host_build.library(portable=request.param)
    monkeypatch.setattr(host_linear, "library", lambda: chosen)
    host_linear._functions.cache_clear()
    yield
    host_linear._functions.cache_clear()


def expected(linear: PanelLinear, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return the reference's float64 result for the activations that the kernel is given."""
    given = x.double() if isinstance(linear, Int8ActivationLinear) else x.float().double()
    return reference.panel_linear(
        given,
        linear.weight,
        linear.scale,
        linear.zero_point,
        bias,
        linear.out_features,
        linear.bits,
        linear.group_size,
        isinstance(linear, Int8ActivationLinear),
    )


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("kind", [PanelLinear, Int8ActivationLinear])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("out", "columns", "group_size"), SHAPES)
def test_against_float64(
    kind: type[PanelLinear], bits: int, symmetric: bool, out: int, columns: int, group_size: int
) -> None:
    linear = kind(stored(bits, out, columns, group_size, symmetric))
    bias = torch.linspace(-1, 1, out) if symmetric else None
    whole = inputs((TOKENS[-1],), columns, torch.bfloat16)
    wanted = expected(linear, whole, bias)
    results = {tokens: linear(whole.float()[:tokens], bias) for tokens in TOKENS}
    tolerance = SUMS if kind is Int8ActivationLinear else SPLIT
    for tokens, found in results.items():
        assert error(found, wanted[:tokens]) < tolerance
        assert torch.equal(found, results[TOKENS[-1]][:tokens]), "the batch changes no bit"
    narrow = {tokens: linear(whole[:tokens], bias) for tokens in TOKENS}
    for tokens, found in narrow.items():
        assert error(found, wanted[:tokens]) < SUMS + RESULT[torch.bfloat16]
        assert torch.equal(found, narrow[TOKENS[-1]][:tokens])


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("kind", [PanelLinear, Int8ActivationLinear])
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", list(RESULT))
def test_types(kind: type[PanelLinear], scale: torch.dtype, dtype: torch.dtype) -> None:
    matrix = stored(4, 40, 160, 32, symmetric=False)
    held = Stored(matrix.packed, matrix.scale.to(scale), matrix.zero_point, 4, 32, 160)
    linear = kind(held)
    assert linear.scale.dtype == scale
    x = inputs((2, 3), 160, dtype)
    found = linear(x)
    assert (found.dtype, found.shape) == (dtype, (2, 3, 40))
    # Codes of int8 are found from x / step in float32, so ties may fall either way only in float64.
    given = x.float() if kind is Int8ActivationLinear else x
    assert error(found, expected(linear, given, None)) < SPLIT + RESULT[dtype]


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_activations_are_those_of_plain_integers(bits: int, symmetric: bool) -> None:
    matrix = stored(bits, 48, 128, 64, symmetric)
    linear = Int8ActivationLinear(matrix)
    x = inputs((5,), 128, torch.float32)
    step = x.abs().amax(-1, keepdim=True) / 127
    codes = (x / step).round().long()
    weight = reference.dequantize_packed(
        matrix.packed, torch.ones(48, 2), matrix.zero_point, bits, 64, 128
    ).long()
    sums = torch.stack([codes[:, at : at + 64] @ weight[:, at : at + 64].T for at in (0, 64)], -1)
    wanted = (sums.double() * matrix.scale.double()).sum(-1) * step.double()
    assert error(linear(x), wanted) < SUMS
    assert not linear(torch.zeros(1, 128)).any(), "a token of zeros has no scale"


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("kind", [PanelLinear, Int8ActivationLinear])
def test_one_scale_a_matrix(kind: type[PanelLinear]) -> None:
    linear = kind(stored(4, 24, 80, -1, symmetric=False, per_tensor=True))
    x = inputs((3,), 80, torch.bfloat16).float()
    assert error(linear(x), expected(linear, x, None)) < SPLIT


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_token(value: float) -> None:
    linear = PanelLinear(stored(4, 24, 64, 32, symmetric=True))
    x = inputs((2,), 64, torch.bfloat16)
    clean = linear(x)[1]
    x[0, 5] = value
    found = linear(x)
    assert not found[0].isfinite().all()
    assert torch.equal(found[1], clean)


def arguments(bits: int, int8: bool, bias: bool) -> tuple[Any, ...]:
    kind = INT8_ACTIVATION_LINEARS[bits] if int8 else PACKED_LINEARS[bits]
    linear = kind(stored(bits, 20, 96, 32, symmetric=bias))
    held = torch.ones(20) if bias else None
    x = inputs((2, 3), 96, torch.float32)
    return x, linear.weight, linear.scale, linear.zero_point, held, 20, bits, 32, int8


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bits: int, int8: bool, bias: bool) -> None:
    results = torch.library.opcheck(panel_linear, arguments(bits, int8, bias))
    assert set(results.values()) == {"SUCCESS"}


def test_in_a_graph_the_op_runs() -> None:
    linear = PanelLinear(stored(4, 20, 96, 32, symmetric=False))
    x = inputs((3,), 96, torch.float32)
    graph = torch.export.export(linear, (x,))
    assert "quantbench.panel_linear" in str(graph.graph)
    assert torch.equal(graph.module()(x), linear(x))


def test_a_copy_does_not_read_the_original() -> None:
    linear = PanelLinear(stored(8, 64, 65536, -1, symmetric=True))
    assert linear.weight.nbytes == 64 * 65536, "in large pages, and no larger"
    x = inputs((1,), 65536, torch.float32)
    other = deepcopy(linear)
    wanted = linear(x)
    linear.weight.zero_()
    assert torch.equal(other(x), wanted)
    assert not torch.equal(linear(x), wanted)


@pytest.mark.parametrize("group_size", [-1, 32, 64, 96, 128, 1024])
def test_groups_that_are_taken(group_size: int) -> None:
    assert PanelLinear.refusal(group_size) is None


@pytest.mark.parametrize("group_size", [0, 16, 48, 100])
def test_groups_that_are_refused(group_size: int) -> None:
    assert f"no groups of {group_size} inputs" in str(PanelLinear.refusal(group_size))


def test_sums_that_int32_does_not_hold_are_refused() -> None:
    matrix = stored(2, 1, 65600, -1, symmetric=True)
    assert PanelLinear(matrix).out_features == 1
    with pytest.raises(ValueError, match="groups of 65600 inputs"):
        Int8ActivationLinear(matrix)


def test_where_there_is_no_compiler_others_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.linear_of(3) == (PanelLinear, "")
    assert cpu.linear_of(5) == (None, "")
    monkeypatch.setattr(host_build, "unavailable", lambda: "no compiler")
    assert cpu.linear_of(4) == (Int4Linear, "no compiler")
    assert cpu.linear_of(3) == (None, "no compiler")


DENSE_TYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("dtype", DENSE_TYPES)
@pytest.mark.parametrize("activation", [host_linear.ONE_BF16, host_linear.TWO_BF16])
@pytest.mark.parametrize(("out", "columns"), [(64, 256), (70, 77), (1, 1), (3, 33)])
def test_weights_that_are_not_quantized(
    dtype: torch.dtype, activation: int, out: int, columns: int
) -> None:
    generator = torch.Generator().manual_seed(out + columns)
    weight = torch.randn(out, columns, generator=generator).to(dtype)
    bias = torch.linspace(-1, 1, out)
    x = inputs((6,), columns, torch.bfloat16).float()
    matrix = host_linear.Matrix(
        kind=host_linear.SCALE_KINDS[dtype],
        activation=activation,
        rows=out,
        columns=columns,
        width=columns,
        group=columns,
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
    )
    wanted = x.double() @ weight.double().T + bias.double()
    found = host_linear.multiply(matrix, x)
    assert error(found, wanted) < SUMS
    for tokens in range(1, 6):
        assert torch.equal(host_linear.multiply(matrix, x[:tokens]), found[:tokens])


def test_what_is_prepared_is_shared_only_where_it_is_the_same() -> None:
    shares = host_build.library().qb_shares
    shares.argtypes = [ctypes.POINTER(host_linear.Matrix)] * 2

    def matrix(group: int, zero: int | None = None, **changed: int) -> host_linear.Matrix:
        facts = {"kind": 4, "activation": 1, "columns": 256, "width": 256, **changed}
        return host_linear.Matrix(rows=64, group=group, zero=zero, **facts)

    plain, zeros = matrix(64), matrix(64, 1)
    assert shares(plain, matrix(128)), "without zero points groups do not matter"
    assert shares(plain, matrix(64, kind=2)), "nor do bits"
    assert shares(zeros, matrix(64, 1))
    for other in (zeros, matrix(64, activation=2), matrix(64, columns=250), matrix(64, kind=32)):
        assert not shares(plain, other)
    assert not shares(zeros, matrix(128, 1))
    rounded = matrix(64, activation=8)
    assert shares(rounded, matrix(64, 1, activation=8))
    assert not shares(rounded, matrix(128, activation=8))
