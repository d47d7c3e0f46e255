"""The CUDA layout: round trips, and what a lane finds in its words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kernels.errors import ConfigError
from kernels.fragments import (
    GROUPS,
    LAYOUT_VERSION,
    ROWS,
    STEP,
    UNITS,
    Fragments,
    code_offset,
    pack_fragments,
    padded_shape,
    tile_inputs,
    unpack_fragments,
)
from kernels.reference import dequantize

BITS = tuple(UNITS)


def random_matrix(
    out: int, width: int, bits: int, group_size: int, zeros: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-width // group_size)
    codes = torch.randint(0, 2**bits, (out, width), generator=generator).to(torch.uint8)
    scale = (torch.rand((out, groups), generator=generator) * 0.01 + 1e-4).half()
    zero_point = torch.randint(0, 2**bits, (out, groups), generator=generator).to(torch.uint8)
    return codes, scale, zero_point if zeros else None


def dense(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int) -> Tensor:
    """The float32 weights [out, in] that a matrix stands for."""
    width = codes.shape[1]
    covered = width if group == -1 else scale.shape[1] * group
    padded = functional.pad(codes, (0, covered - width))
    return dequantize(padded, scale, zero_point, bits)[:, :width]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    out=st.integers(1, 130),
    width=st.integers(1, 400),
    group_size=st.sampled_from((-1, *GROUPS)),
    zeros=st.booleans(),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
    seed=st.integers(0, 1000),
)
def test_every_shape_comes_back(
    bits: int,
    out: int,
    width: int,
    group_size: int,
    zeros: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    codes, scale, zero_point = random_matrix(out, width, bits, group_size, zeros, seed)
    scale = scale.to(dtype)
    packed = pack_fragments(codes, scale, zero_point, bits, group_size)
    rows, columns = padded_shape(out, width)
    assert packed.padded == (rows, columns)
    assert packed.words.numel() * 4 == rows * columns * bits // 8, "not a bit more than the codes"
    found_codes, found_scale, found_zero = unpack_fragments(packed)
    assert torch.equal(found_codes, codes)
    assert torch.equal(found_scale, scale.float())
    if zero_point is None:
        assert found_zero is None
    else:
        assert found_zero is not None
        assert torch.equal(found_zero, zero_point)


@pytest.mark.parametrize("group_size", [256, 384])
def test_wide_groups_come_back_as_groups_of_a_step(group_size: int) -> None:
    codes, scale, zero_point = random_matrix(20, 700, 4, group_size, True)
    packed = pack_fragments(codes, scale, zero_point, 4, group_size)
    found = dense(*unpack_fragments(packed), 4, STEP)
    assert torch.equal(found, dense(codes, scale, zero_point, 4, group_size))


def test_a_scale_for_the_matrix_stands_for_all_rows() -> None:
    codes, _, _ = random_matrix(20, 50, 8, -1, False)
    packed = pack_fragments(codes, torch.tensor([[0.5]]), torch.tensor([[3]]).byte(), 8, -1)
    _, scale, zero_point = unpack_fragments(packed)
    assert zero_point is not None
    assert torch.equal(scale, torch.full((20, 1), 0.5))
    assert torch.equal(zero_point, torch.full((20, 1), 3).byte())


def test_float32_scales_of_groups_keep_eleven_bits() -> None:
    codes, _, _ = random_matrix(20, 256, 4, 32, False)
    scale = torch.rand(20, 8, generator=torch.Generator().manual_seed(3)) + 0.01
    _, found, _ = unpack_fragments(pack_fragments(codes, scale, None, 4, 32))
    assert float(((found - scale) / scale).abs().max()) <= 2**-11


def words_of_lane(packed: Fragments, n_tile: int, k_tile: int, lane: int) -> list[int]:
    """What a lane gets from its loads: 16 bytes, and 8 of high bits."""
    words = packed.words[n_tile, k_tile].numpy().view(np.uint32)
    low = words[4 * lane : 4 * lane + 4]
    high = words[128 + 2 * lane : 130 + 2 * lane]
    return [int(word) for word in (*low, *high)]


def extracted_pair(words: list[int], bits: int, unit: int, i: int, pair: int) -> tuple[int, int]:
    """The fp16 bits of two weights, by shifts, masks and an OR, written out from the table."""
    slot, odd = 4 * (unit % 2) + pair, unit % 2
    if bits == 8:
        word = words[2 * i + pair // 2] >> (16 * (pair % 2))
        return 0x6400 | word & 255, 0x6400 | word >> 8 & 255
    word = words[2 * unit + i] if bits == 4 else words[2 * (unit // 2) + i]
    shift, place = {
        4: ((0, 0), (0, 4), (6, 2), (6, 6))[pair],
        3: (8 * odd, 2 * pair),
        2: (0, 2 * slot) if slot < 5 else (6, 2 * slot - 6),
    }[bits]
    field = ((1 << min(bits, 4 if bits == 4 else 2)) - 1) << place
    halves = [(word >> shift) & field, (word >> shift >> 16) & field]
    if bits == 3:
        turn = odd + 8 * (unit // 2)
        high = (words[4 + i] >> turn | words[4 + i] << (32 - turn)) & 0xFFFFFFFF
        halves = [halves[0] | high & 4 << place, halves[1] | high >> 16 & 4 << place]
    return halves[0] | (25 - place) << 10, halves[1] | (25 - place) << 10


def as_half(bits: int) -> float:
    return float(np.array(bits, dtype=np.uint16).view(np.float16))


def fragments_of_tile(packed: Fragments, n_tile: int, k_tile: int) -> np.ndarray:
    """A of each mma of a k-tile as the PTX ISA lays it out: [fragment, 16, 16], offset + code."""
    found = np.zeros((2 * UNITS[packed.bits], 16, 16))
    for lane in range(32):
        words = words_of_lane(packed, n_tile, k_tile, lane)
        g, t = lane // 4, lane % 4
        for unit in range(UNITS[packed.bits]):
            for pair in range(4):
                for i in range(2):
                    # Register a(i + 2r): row g + 8i, columns 2t + 8r and 2t + 8r + 1.
                    low, high = extracted_pair(words, packed.bits, unit, i, pair)
                    f, column = 2 * unit + pair // 2, 2 * t + 8 * (pair % 2)
                    found[f, g + 8 * i, column : column + 2] = as_half(low), as_half(high)
    return found


def operand_b(x: np.ndarray) -> np.ndarray:
    """B of each mma of a k-tile, x [tokens, inputs]: [fragment, 16, tokens].

    A lane holds 8 consecutive inputs of a unit, which are rows 2t, 2t + 1, 2t + 8, 2t + 9 of the
    unit's two fragments.
    """
    units = x.reshape(x.shape[0], -1, 4, 2, 2, 2)  # token, unit, t, f, r, h
    return units.transpose(1, 3, 4, 2, 5, 0).reshape(-1, 16, x.shape[0])


@pytest.mark.parametrize("bits", BITS)
def test_lanes_find_what_mma_multiplies(bits: int) -> None:
    inputs = tile_inputs(bits)
    codes, scale, _ = random_matrix(64, 2 * STEP, bits, -1, False)
    packed = pack_fragments(codes, scale, None, bits, -1)
    x = np.random.default_rng(0).integers(-8, 8, (8, 2 * STEP)).astype(np.float64)
    offsets = np.array(code_offset(bits))
    for n_tile, k_tile in ((0, 0), (3, 1), (1, 2 * STEP // inputs - 1)):
        rows = slice(n_tile * ROWS, (n_tile + 1) * ROWS)
        columns = slice(k_tile * inputs, (k_tile + 1) * inputs)
        a, b = fragments_of_tile(packed, n_tile, k_tile), operand_b(x[:, columns])
        summed = np.einsum("frk,fkn->rn", a, b)
        corrected = summed - x[:, columns] @ offsets
        # Small integers: the comparison is exact.
        assert np.array_equal(corrected, codes[rows, columns].numpy() @ x[:, columns].T)


def test_layout_version_1() -> None:
    assert LAYOUT_VERSION == 1, "another layout needs another version, and a reader for this one"
    codes = torch.zeros((16, 128), dtype=torch.uint8)
    codes[9, 32 + 8 * 2 + 3] = 5  # lane 4 * 1 + 2, unit 1, half-tile 1, pair 1, half 1
    packed = pack_fragments(codes, torch.ones(16, 1), None, 4, -1)
    expected = torch.zeros_like(packed.words)
    expected[0, 0, 4 * 6 + 3] = 5 << (16 + 4)
    assert torch.equal(packed.words, expected)


def test_scales_stand_as_lanes_take_them() -> None:
    codes, _, _ = random_matrix(20, 256, 4, 64, False)
    scale = (1 + torch.arange(20 * 4).reshape(20, 4) / 1024).half()
    packed = pack_fragments(codes, scale, None, 4, 64)
    assert packed.scale is not None
    assert torch.equal(packed.row_scale[:20], torch.ones(20))
    # Row 3 and row 11, inputs 192 to 255: group 1 of step 1.
    assert torch.equal(packed.scale[0, 1, 3, 1], scale[[3, 11], 3])
    assert not packed.scale[1, :, 4:].any(), "rows that are not there have no scale"


@pytest.mark.parametrize(
    ("bits", "group_size", "scale", "said"),
    [
        (5, -1, 1.0, "no CUDA layout for 5 bits"),
        (4, 48, 1.0, "no CUDA kernel for groups of 48 inputs"),
        (4, 0, 1.0, "no CUDA kernel for groups of 0 inputs"),
        (4, -1, float("inf"), "a scale is not finite"),
    ],
)
def test_what_has_no_layout_is_said(bits: int, group_size: int, scale: float, said: str) -> None:
    codes = torch.zeros((4, 96), dtype=torch.uint8)
    groups = 2 if group_size == 48 else 1
    with pytest.raises(ConfigError, match=said):
        pack_fragments(codes, torch.full((4, groups), scale), None, bits, group_size)


def test_what_does_not_fit_is_refused() -> None:
    codes = torch.full((4, 96), 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="does not fit 2 bits"):
        pack_fragments(codes, torch.ones(4, 1), None, 2, -1)
    with pytest.raises(ValueError, match="scales"):
        pack_fragments(codes, torch.ones(4, 2), None, 4, -1)
    with pytest.raises(ValueError, match="zero points"):
        pack_fragments(codes, torch.ones(4, 1), torch.ones(4, 1), 4, -1)
    with pytest.raises(ValueError, match="codes must be uint8"):
        pack_fragments(codes.int(), torch.ones(4, 1), None, 4, -1)
