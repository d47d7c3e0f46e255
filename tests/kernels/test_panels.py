"""The layout of panels: where each code lies, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.panels import (
    LANES,
    PAIRS,
    QUADS,
    Order,
    pack_grid,
    pack_panels,
    panel_shape,
    unpack_grid,
    unpack_panels,
)

BITS = (8, 4, 3, 2)


def drawn(bits: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits + rows + width)
    return torch.randint(0, 2**bits, (rows, width), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("order", [PAIRS, QUADS])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "width"), [(64, 64), (5, 32), (133, 96), (1100, 32), (1, 64)])
def test_codes_come_back(order: Order, bits: int, rows: int, width: int) -> None:
    codes = drawn(bits, rows, width)
    panels = pack_panels(codes, bits, order)
    assert panels.numel() * 8 == -(-rows // LANES) * LANES * width * bits, "no bit is unused"
    assert torch.equal(unpack_panels(panels, bits, order, rows, width), codes)
    if rows > 64:
        last = unpack_panels(panels, bits, order, rows - 64, width, start=64)
        assert torch.equal(last, codes[64:])


def place(bits: int, order: Order, row: int, column: int) -> set[tuple[int, int]]:
    """Return (word, bit) of each bit that one code changes among the words of 80 rows of 64 inputs.

    The code is one that shares no bit with code 0.
    """
    codes = torch.zeros(80, 64, dtype=torch.uint8)
    without = pack_panels(codes, bits, order).view(torch.int32)
    codes[row, column] = 128 if (bits, order) == (8, PAIRS) else 2**bits - 1
    words = (pack_panels(codes, bits, order).view(torch.int32) ^ without).tolist()
    return {(at, bit) for at, word in enumerate(words) for bit in range(32) if word >> bit & 1}


def test_a_byte_is_sign_and_magnitude_of_the_code_less_127_and_a_half() -> None:
    codes = torch.tensor([[128, 127, 255, 0] + [128] * 28], dtype=torch.uint8)
    row = pack_panels(codes, 8, PAIRS)[[0, 2, 1, 3]].tolist()  # two pairs in a word
    assert row == [0, 0x80, 127, 0xFF]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (17, 1), (35, 40), (66, 63)])
def test_where_a_code_lies(bits: int, row: int, column: int) -> None:
    unit, block, lane = row // 64, row % 64 // 16, row % 16
    held = 4 if unit == 0 else 1
    step = unit * 4 * 2 + column // 32 * held + block  # blocks of 16 rows and 32 inputs before it
    for order, inputs, each in ((PAIRS, 2, 16), (QUADS, 4, 8)):
        tuple_, within = divmod(column % 32, inputs)
        word, shift = divmod(tuple_, each // bits)
        at = (step * bits + word) * 16 + lane
        first = within * each + shift * bits
        assert place(bits, order, row, column) == {(at, first + bit) for bit in range(bits)}


def test_where_a_code_of_three_bits_lies() -> None:
    # Pair 7 is the third of word 1; pair 15 has one bit in each word.
    assert place(3, PAIRS, 2, 15) == {(18, 16 + 6), (18, 16 + 7), (18, 16 + 8)}
    assert place(3, PAIRS, 2, 30) == {(2, 15), (18, 15), (34, 15)}
    # Quad 5 is the second of word 1, its high bits are bit 5 of the bytes of word 2.
    assert place(3, QUADS, 2, 21) == {(18, 8 + 2), (18, 8 + 3), (34, 8 + 5)}


def test_scales_lie_by_units_and_groups() -> None:
    scale = torch.arange(80 * 3.0).reshape(80, 3)
    flat = pack_grid(scale)
    assert flat[:2].tolist() == [0, 3], "rows of a group side by side"
    assert flat[64].item() == 1, "then the next group of the unit"
    assert flat[64 * 3].item() == 64 * 3, "then the next unit"
    assert torch.equal(unpack_grid(flat, 80, 3), scale)


@pytest.mark.parametrize(
    ("columns", "group_size", "expected"), [(100, -1, (128, 128)), (100, 64, (128, 64))]
)
def test_widths_are_filled_up(columns: int, group_size: int, expected: tuple[int, int]) -> None:
    assert panel_shape(columns, group_size) == expected
