"""Round trips of packed ternary values, and the layout byte by byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ternary import BYTES_USED, VALUES_PER_BYTE, pack, packed_bytes, unpack


@settings(max_examples=80, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    width=st.integers(1, 33),
    seed=st.integers(0, 1000),
)
def test_every_shape_comes_back(leading: list[int], width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-1, 2, (*leading, width), generator=generator, dtype=torch.int8)
    packed = pack(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, -(-width // 5))
    assert torch.equal(unpack(packed, width), values)


@given(st.lists(st.integers(-1, 1), min_size=5, max_size=5))
def test_a_byte_is_a_number_in_base_three(values: list[int]) -> None:
    number = sum((value + 1) * 3**place for place, value in enumerate(values))
    assert pack(torch.tensor(values, dtype=torch.int8)).tolist() == [number]
    assert number < BYTES_USED == 243


def test_all_bytes_in_use_differ_and_come_back() -> None:
    every = torch.arange(BYTES_USED).to(torch.uint8)[:, None]
    values = unpack(every, VALUES_PER_BYTE)
    assert len({tuple(row) for row in values.tolist()}) == BYTES_USED
    assert torch.equal(pack(values), every)


def test_a_row_is_filled_up_with_zero_weights() -> None:
    packed = pack(torch.ones(2, 6, dtype=torch.int8))
    assert unpack(packed, 10).tolist() == [[1] * 6 + [0] * 4] * 2
    assert packed_bytes(6) == 2


def test_transposed_views_are_packed_as_they_read() -> None:
    values = torch.randint(-1, 2, (15, 4), dtype=torch.int8).T
    assert torch.equal(unpack(pack(values), 15), values)


def test_a_weight_takes_1_6_bits() -> None:
    assert 8 * packed_bytes(5000) / 5000 == 1.6


def test_other_values_types_and_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="values from -1 to 2 are not ternary"):
        pack(torch.tensor([-1, 2], dtype=torch.int8))
    with pytest.raises(ValueError, match="must be int8"):
        pack(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="do not hold 6 ternary values"):
        unpack(torch.zeros(2, 1, dtype=torch.uint8), 6)
    with pytest.raises(ValueError, match="do not hold"):
        unpack(torch.zeros(2, 1), 5)
    with pytest.raises(IndexError):
        unpack(torch.tensor([[243]], dtype=torch.uint8), 5)
