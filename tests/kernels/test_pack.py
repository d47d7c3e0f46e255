"""Round trips of the packed layout, and the layout itself byte by byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.pack import CODES_PER_UNIT, LAYOUT_VERSION, pack, packed_bytes, padded_width, unpack

BITS = tuple(CODES_PER_UNIT)


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)


@settings(max_examples=120, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    leading=st.lists(st.integers(1, 5), max_size=3),
    width=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_every_shape_comes_back(bits: int, leading: list[int], width: int, seed: int) -> None:
    codes = random_codes((*leading, width), bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, packed_bytes(width, bits))
    assert torch.equal(unpack(packed, bits, width), codes)
    everything = unpack(packed, bits)
    assert everything.shape[-1] == padded_width(width, bits)
    assert not everything[..., width:].any(), "a row is filled up with zero codes"


@pytest.mark.parametrize("bits", BITS)
def test_a_full_row_takes_exactly_its_bits(bits: int) -> None:
    assert packed_bytes(256, bits) == 256 * bits // 8
    assert pack(random_codes((3, 256), bits), bits).numel() == 3 * 256 * bits // 8


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (8, [0, 255, 7], [0, 255, 7]),
        (4, [1, 2, 15, 0], [0x21, 0x0F]),
        (2, [1, 2, 3, 0], [0b00_11_10_01]),
        # A plane of the low two bits, then a plane of the high bit.
        (3, [0, 1, 2, 3, 4, 5, 6, 7], [0b11_10_01_00, 0b11_10_01_00, 0b11110000]),
    ],
)
def test_layout_version_1(bits: int, codes: list[int], expected: list[int]) -> None:
    assert LAYOUT_VERSION == 1, "another layout needs another version, and a reader for this one"
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == expected


def test_transposed_views_are_packed_as_they_read() -> None:
    codes = random_codes((16, 24), 4).T
    assert torch.equal(unpack(pack(codes, 4), 4), codes)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_code_that_is_too_large_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"does not fit {bits} bits"):
        pack(torch.tensor([2**bits], dtype=torch.uint8), bits)


def test_other_types_bits_and_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        pack(torch.tensor([1]), 4)
    with pytest.raises(ValueError, match="no packed layout for 5 bits"):
        pack(torch.tensor([1], dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="hold no 9 codes of 4 bits"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 4, 9)
