"""PyTorch's packed CPU kernels in our hands: every shape and type against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import aten
from kernels.aten import Int4Linear, Int8Linear
from kernels.pack import pack, packed_bytes
from kernels.reference import dequantize_packed
from kernels.stored import Stored

# Largest error relative to the largest output: the kernels compute in bfloat16, whatever comes in.
TOLERANCE = 2e-2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stored(
    bits: int, out: int, columns: int, group_size: int, symmetric: bool, per_tensor: bool = False
) -> Stored:
    generator = torch.Generator().manual_seed(out * columns + bits)
    groups = 1 if group_size == -1 else -(-columns // group_size)
    width = columns if group_size == -1 else groups * group_size
    codes = torch.randint(0, 2**bits, (out, width), generator=generator).to(torch.uint8)
    shape = (1, 1) if per_tensor else (out, groups)
    scale = (torch.rand(shape, generator=generator) * 0.1 + 0.01).half()
    middle = 2 ** (bits - 1)
    zeros = torch.randint(middle - 2, middle + 2, shape, generator=generator).to(torch.uint8)
    zero_point = None if symmetric else pack(zeros.flatten(), bits)
    return Stored(pack(codes, bits), scale, zero_point, bits, group_size, columns)


def largest_error(matrix: Stored, y: Tensor, x: Tensor) -> float:
    weight = dequantize_packed(
        matrix.packed,
        matrix.scale,
        matrix.zero_point,
        matrix.bits,
        matrix.group_size,
        matrix.columns,
    )
    expected = x.double() @ weight.double().T
    assert y.shape == expected.shape
    return float((y.double() - expected).abs().max() / expected.abs().max())


def inputs(tokens: tuple[int, ...], columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*tokens, columns, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("out", "columns", "group_size"),
    [
        (64, 128, 32),
        (16, 64, 64),
        (48, 256, 128),
        (5, 96, 32),  # rows are filled up to 16
        (33, 172, -1),  # and inputs to 32
        (20, 172, 64),  # the last group is filled by the packing
        (17, 1024, 512),  # a group larger than the kernel's
        (31, 192, 96),  # a group that only 32 divides
        (1, 1, -1),
    ],
)
def test_int4(dtype: torch.dtype, symmetric: bool, out: int, columns: int, group_size: int) -> None:
    matrix = stored(4, out, columns, group_size, symmetric)
    linear = Int4Linear(matrix)
    for tokens in ((1,), (2, 3), (37,)):
        x = inputs(tokens, columns, dtype)
        y = linear(x)
        assert y.dtype == dtype
        assert largest_error(matrix, y, x) < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
# The bare kernel crashes in bfloat16 where 16 does not divide the number of inputs.
@pytest.mark.parametrize(("out", "columns"), [(64, 128), (5, 172), (33, 65), (7, 13), (1, 1)])
def test_int8(dtype: torch.dtype, symmetric: bool, out: int, columns: int) -> None:
    matrix = stored(8, out, columns, -1, symmetric)
    linear = Int8Linear(matrix)
    for tokens in ((1,), (2, 3), (37,)):
        x = inputs(tokens, columns, dtype)
        y = linear(x)
        assert y.dtype == dtype
        assert largest_error(matrix, y, x) < TOLERANCE


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "kind"), [(4, Int4Linear), (8, Int8Linear)])
def test_one_scale_a_matrix(
    bits: int, kind: type[Int4Linear] | type[Int8Linear], symmetric: bool
) -> None:
    matrix = stored(bits, 24, 80, -1, symmetric, per_tensor=True)
    x = inputs((3,), 80, torch.float32)
    assert largest_error(matrix, kind(matrix)(x), x) < TOLERANCE


@pytest.mark.parametrize("value", [0, 128, 255])
def test_what_bfloat16_holds_is_exact_in_8_bits(value: int) -> None:
    matrix = stored(8, 3, 64, -1, symmetric=False)
    assert matrix.zero_point is not None
    matrix.zero_point.fill_(value)
    # One weight a token: products of 8 bits, and scales that are not rounded.
    x = torch.eye(64)
    assert largest_error(matrix, Int8Linear(matrix)(x), x) < 1e-6


def test_blocks_of_rows_join_to_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = stored(4, 330, 64, 32, symmetric=False)
    whole = Int4Linear(matrix).weight
    monkeypatch.setattr(aten, "INT4_BLOCK_ROWS", 128)
    assert torch.equal(Int4Linear(matrix).weight, whole)


def test_the_weights_stay_packed() -> None:
    four = Int4Linear(stored(4, 64, 256, 128, symmetric=True))
    assert four.weight.nbytes == 64 * packed_bytes(256, 4)
    eight = Int8Linear(stored(8, 64, 256, -1, symmetric=True))
    assert eight.weight.nbytes == 64 * 256


@pytest.mark.parametrize("group_size", [-1, 32, 64, 96, 128, 256, 512, 1024])
def test_groups_the_int4_kernel_takes(group_size: int) -> None:
    assert Int4Linear.refusal(group_size) is None


@pytest.mark.parametrize("group_size", [16, 48, 100])
def test_groups_the_int4_kernel_refuses(group_size: int) -> None:
    assert f"no groups of {group_size} inputs" in str(Int4Linear.refusal(group_size))


def test_int8_takes_one_scale_a_row() -> None:
    assert Int8Linear.refusal(-1) is None
    assert "one scale a row" in str(Int8Linear.refusal(128))
