"""The CUDA kernels' own code, run lane by lane on the processor, against float64.

Each is run twice, first and last warp first and as far ahead of the others as it may get, and must
give the same bits: a missing barrier shows.
Shared memory has the size of the plan, with a guard behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels import plans
from kernels.fragments import STEP, Fragments, pack_fragments
from kernels.pack import pack
from methods.affine import Affine, quantize
from tests.kernels.emulate import Emulated
from tests.kernels.test_fragments import dense, random_matrix

DTYPES = {torch.float16: 0, torch.bfloat16: 1}

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place: the most that rounding changes an output, relatively."""

SUMS = 3e-5
"""The most that fp32 sums over offset codes may be off, relative to the norm of the result."""

WEIGHTS = 2.0**-12
"""Error of weights of groups rounded to fp16, of random sign, relative to the result's norm."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@dataclass
class Case:
    """A random problem: the matrix, x, bias and the float64 result."""

    packed: Fragments
    x: Tensor
    bias: Tensor | None
    expected: Tensor

    @staticmethod
    def random(
        bits: int,
        group: int,
        zeros: bool,
        dtype: torch.dtype,
        shape: tuple[int, int, int],
        bias: bool = True,
    ) -> Case:
        m, out, width = shape
        generator = torch.Generator().manual_seed(m * width + out)
        codes, scale, zero_point = random_matrix(out, width, bits, group or -1, zeros)
        x = torch.randn(m, width, generator=generator)
        # What an activation function leaves: a mean, which the offsets multiply, and outliers.
        x = (x * (1 + 50 * (torch.rand(width, generator=generator) < 0.01)) + 0.5).to(dtype)
        added = torch.randn(out, generator=generator).to(dtype) if bias else None
        packed = pack_fragments(codes, scale, zero_point, bits, group or -1)
        weight = dense(codes, scale, zero_point, bits, group or -1)
        expected = functional.linear(
            x.double(), weight.double(), None if added is None else added.double()
        )
        return Case(packed, x, added, expected)

    @property
    def defines(self) -> dict[str, int]:
        return {
            "BITS": self.packed.bits,
            "GROUP": self.packed.group_size,
            "ZEROS": int(self.packed.zero_point is not None),
            "DTYPE": DTYPES[self.x.dtype],
        }

    def check(self, found: Tensor, tolerance: float) -> None:
        """Each output within its rounding and, beyond that, `tolerance` of the result's norm."""
        norm = self.expected.norm() / math.sqrt(self.expected.numel())
        error = (found.double() - self.expected).abs()
        slack = ROUNDING[found.dtype] * self.expected.abs()
        assert torch.isfinite(found).all()
        excess = (error - slack).clamp(min=0)
        assert float(excess.norm() / math.sqrt(excess.numel())) <= tolerance * float(norm)
        assert float(excess.max()) <= 8 * tolerance * float(norm)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def run_decode(folder: Path, case: Case, tiles: int, splits: int, backwards: bool) -> Tensor:
    packed, (m, k) = case.packed, case.x.shape
    rows, columns = packed.padded
    kernel = Emulated(folder, "decode.cu", "decode", {**case.defines, "TILES": tiles})
    y, partial = nan(m, packed.out_features, dtype=case.x.dtype), nan(splits, m, rows)
    arrived = torch.zeros(rows // (16 * tiles), dtype=torch.int32)
    most = -(-columns // STEP // splits) * STEP
    shared = plans.decode_shared(m, most, tiles, packed.group_size, packed.zero_point is not None)
    tensors = (packed.words, packed.scale, packed.zero_point, packed.row_scale, case.bias)
    sizes = (m, packed.out_features, k, columns)
    kernel.launch(
        (rows // (16 * tiles), splits),
        plans.THREADS,
        shared,
        case.x,
        *tensors,
        y,
        partial,
        arrived,
        *sizes,
        backwards=backwards,
    )
    assert not arrived.any(), "counters are left as they were found"
    return y


DECODE_CASES = [
    # bits, group, zeros, dtype, (m, out, in), row tiles, splits
    (8, 0, False, torch.bfloat16, (3, 70, 300), 2, 2),
    (8, 128, False, torch.float16, (1, 33, 1300), 1, 1),
    (8, 0, True, torch.float16, (2, 16, 136), 1, 1),
    (4, 128, False, torch.float16, (1, 100, 4200), 1, 1),
    (4, 128, False, torch.float16, (8, 50, 1304), 4, 3),
    (4, 64, True, torch.bfloat16, (5, 70, 1111), 2, 2),
    (4, 32, True, torch.float16, (4, 40, 520), 2, 1),
    (4, 0, False, torch.bfloat16, (7, 64, 2600), 4, 1),
    (3, 128, True, torch.float16, (1, 65, 9000), 1, 1),
    (3, 32, False, torch.bfloat16, (8, 20, 700), 4, 2),
    (3, 0, True, torch.float16, (2, 30, 1111), 2, 3),
    (2, 64, True, torch.bfloat16, (1, 64, 9000), 1, 1),
    (2, 32, False, torch.float16, (6, 70, 520), 4, 2),
    (2, 0, False, torch.float16, (1, 1, 1), 1, 1),
]


@pytest.mark.parametrize(
    ("bits", "group", "zeros", "dtype", "shape", "tiles", "splits"), DECODE_CASES
)
def test_decode(
    folder: Path,
    bits: int,
    group: int,
    zeros: bool,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    tiles: int,
    splits: int,
) -> None:
    case = Case.random(bits, group, zeros, dtype, shape, bias=tiles > 1)
    found = run_decode(folder, case, tiles, splits, backwards=False)
    case.check(found, SUMS)
    assert torch.equal(found, run_decode(folder, case, tiles, splits, backwards=True))


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-20, 2.0**40, 2.0**100])
def test_bfloat16_of_any_size_keeps_its_accuracy(folder: Path, factor: float) -> None:
    case = Case.random(4, 64, True, torch.bfloat16, (2, 30, 1111), bias=False)
    case.x *= torch.tensor([[factor], [1.0]])
    case.expected *= torch.tensor([[factor], [1.0]], dtype=torch.float64)
    found = run_decode(folder, case, 2, 2, backwards=False)
    for row in range(2):
        one = Case(case.packed, case.x[row : row + 1], None, case.expected[row : row + 1])
        one.check(found[row : row + 1], SUMS)


def test_what_is_not_finite_stays_in_its_token(folder: Path) -> None:
    case = Case.random(4, 64, True, torch.bfloat16, (3, 30, 1111), bias=False)
    case.x[1, 700] = float("inf")
    found = run_decode(folder, case, 2, 2, backwards=False)
    assert not torch.isfinite(found[1]).any()
    assert torch.isfinite(found[[0, 2]]).all()


def test_a_token_of_zeros_gives_the_bias(folder: Path) -> None:
    case = Case.random(4, 64, True, torch.bfloat16, (2, 30, 1111), bias=True)
    case.x[0] = 0
    assert case.bias is not None
    assert torch.equal(run_decode(folder, case, 2, 2, backwards=False)[0], case.bias)


def run_tile(
    folder: Path, function: str, case: Case, tiles: int, stages: int, splits: int, backwards: bool
) -> Tensor:
    packed, (m, k) = case.packed, case.x.shape
    rows, columns = packed.padded
    x, unscale, width = case.x, None, k
    if x.dtype == torch.bfloat16 or k % 8:
        x, unscale, width = nan(m, columns, dtype=torch.float16), nan(m), columns
        prepare = Emulated(folder, "prepare.cu", "prepare", {"DTYPE": DTYPES[case.x.dtype]})
        sizes = (k, columns)
        prepare.launch((m,), plans.THREADS, 16, case.x, x, unscale, *sizes, backwards=backwards)
    tokens = 8 * tiles * (2 if function == "prefill" else 1)
    grid = (-(-rows // plans.FEATURES), -(-m // tokens), splits)
    zeros = packed.zero_point is not None
    shared = plans.tile_shared(packed.bits, packed.group_size, zeros, tokens, stages)
    defines = {**case.defines, "TOKEN_TILES": tiles, "STAGES": stages}
    y, partial = nan(m, packed.out_features, dtype=case.x.dtype), nan(splits, m, rows)
    arrived = torch.zeros(grid[0] * grid[1], dtype=torch.int32)
    tensors = (packed.words, packed.scale, packed.zero_point, packed.row_scale, case.bias)
    numbers = (m, packed.out_features, rows, width, width, columns)
    Emulated(folder, f"{function}.cu", function, defines).launch(
        grid,
        plans.THREADS,
        shared,
        x,
        unscale,
        *tensors,
        y,
        partial,
        arrived,
        *numbers,
        backwards=backwards,
    )
    assert not arrived.any(), "counters are left as they were found"
    return y


TILE_CASES = [
    # function, bits, group, zeros, dtype, (m, out, in), tokens of a warp / 8, stages, splits
    ("batch", 8, 0, True, torch.float16, (9, 50, 520), 2, 3, 3),
    ("batch", 8, 128, False, torch.bfloat16, (17, 50, 520), 4, 4, 2),
    ("batch", 4, 128, False, torch.float16, (20, 200, 1304), 4, 4, 2),
    ("batch", 4, 32, True, torch.bfloat16, (64, 70, 257), 8, 3, 1),
    ("batch", 3, 32, True, torch.float16, (10, 150, 257), 2, 3, 1),
    ("batch", 3, 0, False, torch.bfloat16, (70, 30, 600), 4, 2, 2),
    ("batch", 2, 64, True, torch.float16, (9, 50, 900), 2, 4, 2),
    ("prefill", 8, 0, False, torch.bfloat16, (65, 130, 300), 8, 2, 1),
    ("prefill", 4, 128, True, torch.float16, (130, 70, 264), 8, 3, 1),
    ("prefill", 3, 64, True, torch.bfloat16, (65, 20, 513), 4, 2, 2),
    ("prefill", 2, 32, False, torch.float16, (66, 65, 128), 8, 2, 1),
]


@pytest.mark.parametrize(
    ("function", "bits", "group", "zeros", "dtype", "shape", "tiles", "stages", "splits"),
    TILE_CASES,
)
def test_tiles(
    folder: Path,
    function: str,
    bits: int,
    group: int,
    zeros: bool,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    tiles: int,
    stages: int,
    splits: int,
) -> None:
    case = Case.random(bits, group, zeros, dtype, shape)
    found = run_tile(folder, function, case, tiles, stages, splits, backwards=False)
    case.check(found, SUMS + (WEIGHTS if group else 0))
    assert torch.equal(found, run_tile(folder, function, case, tiles, stages, splits, True))


@pytest.mark.parametrize(
    ("bits", "group", "zeros", "dtype", "shape"),
    [
        (8, 0, True, torch.float16, (50, 300)),
        (4, 64, True, torch.bfloat16, (70, 515)),
        (3, 32, False, torch.float16, (20, 2000)),
        (2, 128, True, torch.bfloat16, (16, 128)),
    ],
)
def test_dequantize_is_the_reference_bit_for_bit(
    folder: Path, bits: int, group: int, zeros: bool, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    codes, scale, zero_point = random_matrix(*shape, bits, group or -1, zeros)
    packed = pack_fragments(codes, scale, zero_point, bits, group or -1)
    defines = {"BITS": bits, "GROUP": group, "ZEROS": int(zeros), "DTYPE": DTYPES[dtype]}
    rows, columns = packed.padded
    found = nan(*shape, dtype=dtype)
    Emulated(folder, "dequantize.cu", "dequantize", defines).launch(
        (rows // 16, -(-columns // STEP // plans.WARPS)),
        plans.THREADS,
        0,
        packed.words,
        packed.scale,
        packed.zero_point,
        packed.row_scale,
        found,
        *shape,
        columns,
    )
    assert torch.equal(found, dense(codes, scale, zero_point, bits, group or -1).to(dtype))


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "dtype"),
    [
        (8, -1, True, torch.float16),
        (4, 64, False, torch.bfloat16),
        (3, 32, True, torch.float32),
        (3, -1, False, torch.float32),
        (2, 128, False, torch.float16),
    ],
)
def test_quantize_is_the_method_bit_for_bit(
    folder: Path, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = torch.randn(13, 301, generator=torch.Generator().manual_seed(bits)).to(dtype)
    weight[2] = 0
    weight[3] *= 1e-6
    weight[4] = weight[4].abs() + 1
    affine = Affine(bits, group, symmetric)
    expected = quantize("w", weight, affine)
    packed = torch.full_like(pack(expected.codes, bits), 0xEE)
    scale = nan(*expected.scale.shape, dtype=torch.float16)
    zeros = torch.zeros(scale.shape, dtype=torch.uint8)
    defines = {
        "BITS": bits,
        "SYMMETRIC": int(symmetric),
        "SOURCE": {**DTYPES, torch.float32: 2}[dtype],
    }
    groups = scale.shape[1]
    sizes = (*weight.shape, 301 if group == -1 else group, groups, packed.shape[1])
    Emulated(folder, "quantize.cu", "quantize", defines).launch(
        (-(-13 * groups // plans.WARPS),), plans.THREADS, 0, weight, packed, scale, zeros, *sizes
    )
    assert torch.equal(scale, expected.scale)
    assert torch.equal(packed, pack(expected.codes, bits))
    if expected.zero_point is not None:
        assert torch.equal(zeros, expected.zero_point)
