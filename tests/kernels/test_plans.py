"""Launches fit every card, for shapes from one weight to the widest layers."""

from __future__ import annotations

import pytest

from kernels import plans
from kernels.fragments import STEP, padded_shape


@pytest.mark.parametrize("m", [1, 2, 5, 8])
@pytest.mark.parametrize(
    "shape", [(1, 1), (4096, 4096), (4096, 11008), (22016, 4096), (100, 50000)]
)
def test_decode_plans_fit(m: int, shape: tuple[int, int]) -> None:
    plan = plans.decode_plan(shape, m, 32, True, processors=132)
    rows, columns = padded_shape(*shape)
    blocks, splits = plan.grid
    assert blocks * 16 * plan.defines["TILES"] == rows
    assert 1 <= splits <= columns // STEP
    assert plan.shared_bytes <= plans.DECODE_SHARED
    assert (plan.partial > 0) == (splits > 1)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("m", [9, 33, 64, 65, 4096])
def test_tile_plans_fit_the_smallest_card(m: int, bits: int) -> None:
    for shape in ((1, 1), (4096, 4096), (11008, 4096)):
        plan = plans.tile_plan(shape, m, bits, 32, True, card=(84, 99 * 1024))
        assert plan.defines["STAGES"] >= 2
        assert plan.shared_bytes <= 99 * 1024
        assert 1 <= plan.grid[2] <= padded_shape(*shape)[1] // STEP
