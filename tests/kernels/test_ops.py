"""The declared op: its reference against the formula, its fake, its schema."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import reference
from kernels.ops import packed_linear
from kernels.pack import pack

BITS = (8, 4, 3, 2)


def stored(
    bits: int, out: int, width: int, group_size: int, symmetric: bool, per_tensor: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return packed codes, scale, packed zero point, and the float64 weight by the formula."""
    generator = torch.Generator().manual_seed(bits * width + out)
    groups = 1 if group_size == -1 else -(-width // group_size)
    span = width if group_size == -1 else group_size
    codes = torch.randint(0, 2**bits, (out, groups * span), generator=generator)
    shape = (1, 1) if per_tensor else (out, groups)
    scale = (torch.rand(shape, generator=generator) + 0.1).half()
    zeros = torch.randint(0, 2**bits, shape, generator=generator)
    offset = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    weight = torch.empty(out, width, dtype=torch.float64)
    for row in range(out):
        for column in range(width):
            at = (0, 0) if per_tensor else (row, column // span)
            weight[row, column] = scale[at].item() * (codes[row, column] - offset[at])
    packed_zeros = None if symmetric else pack(zeros.flatten().to(torch.uint8), bits)
    return pack(codes.to(torch.uint8), bits), scale, packed_zeros, weight


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "group_size"), [(32, 16), (37, 16), (29, -1), (40, 20)])
def test_reference_is_the_formula(bits: int, symmetric: bool, width: int, group_size: int) -> None:
    packed, scale, zeros, weight = stored(bits, 5, width, group_size, symmetric)
    restored = reference.dequantize_packed(packed, scale, zeros, bits, group_size, width)
    torch.testing.assert_close(restored.double(), weight, rtol=1e-6, atol=0)
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))
    bias = torch.arange(5.0)
    y = packed_linear(x, packed, scale, zeros, bias, bits, group_size)
    expected = x.double() @ weight.T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_one_scale_a_matrix(bits: int) -> None:
    packed, scale, zeros, weight = stored(bits, 4, 24, -1, symmetric=False, per_tensor=True)
    restored = reference.dequantize_packed(packed, scale, zeros, bits, -1, 24)
    torch.testing.assert_close(restored.double(), weight, rtol=1e-6, atol=0)


# Largest error against float64, relative to the largest output: the type's own rounding of
# weights, products and results.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_floating_type_is_taken_and_given_back(dtype: torch.dtype) -> None:
    packed, scale, zeros, weight = stored(4, 6, 64, 32, symmetric=False)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = packed_linear(x, packed, scale, zeros, None, 4, 32)
    assert y.dtype == dtype
    expected = x.double() @ weight.T
    assert (y.double() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


def test_scales_that_do_not_cover_the_input_are_refused() -> None:
    packed, scale, zeros, _ = stored(4, 6, 64, 32, symmetric=True)
    with pytest.raises(ValueError, match="2 groups of 32 inputs do not cover a row of 65"):
        packed_linear(torch.zeros(1, 65), packed, scale, zeros, None, 4, 32)
    with pytest.raises(ValueError, match="do not cover"):
        packed_linear(torch.zeros(1, 64), packed, scale, zeros, None, 4, -1)


def arguments(bits: int, symmetric: bool, bias: bool) -> tuple[Any, ...]:
    packed, scale, zeros, _ = stored(bits, 6, 32, 16, symmetric)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(3))
    return x, packed, scale, zeros, torch.ones(6) if bias else None, bits, 16


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(bits: int, symmetric: bool) -> None:
    results = torch.library.opcheck(packed_linear, arguments(bits, symmetric, bias=symmetric))
    assert set(results.values()) == {"SUCCESS"}


def test_the_fake_gives_shape_and_type_without_reading_anything() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 7, 64, dtype=torch.bfloat16)
        packed = torch.empty(48, 32, dtype=torch.uint8)
        y = packed_linear(x, packed, torch.empty(48, 2), None, None, 4, 32)
    assert y.shape == (2, 7, 48)
    assert y.dtype == torch.bfloat16
