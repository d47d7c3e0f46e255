"""The search `kl` of weights: its measure against a slow one, and what it chooses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from methods import affine
from methods.affine import Affine, dequantize, parameters, quantize
from methods.weight_divergence import (
    FEWEST_BINS,
    MOST_BINS,
    SMOOTHING,
    bins_for,
    centres,
    divergence,
    histogram,
)


def drawn(rows: int, width: int, seed: int = 0, outliers: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * 0.02
    if outliers:
        weight[:, 3] *= 12
    return weight


def limits(values: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    if symmetric:
        highest = values.abs().amax(-1)
        return -highest, highest
    return values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)


def slow(values: Tensor, low: float, high: float, scale: float, zero: int, bits: int) -> float:
    """The measure of one group in plain Python loops, in the same precision."""
    bins = bins_for(len(values))
    low, high, scale = (np.float32(value) for value in (low, high, scale))
    width = high / np.float32(bins) - low / np.float32(bins)
    counts = [0] * bins
    for value in values.numpy():
        if value != 0:
            counts[min(max(math.floor((value - low) / width), 0), bins - 1)] += 1
    codes = [round(float((low + np.float32(i + 0.5) * width) / scale)) + zero for i in range(bins)]
    inside = [i for i in range(bins) if 0 <= codes[i] <= 2**bits - 1]
    reference = {i: float(counts[i]) for i in inside}
    reference[inside[0]] += sum(counts[: inside[0]])
    reference[inside[-1]] += sum(counts[inside[-1] + 1 :])
    kept = sum(counts[i] for i in inside)
    found = 0.0
    for i in inside:
        filled = [j for j in inside if codes[j] == codes[i] and counts[j]]
        q = sum(counts[j] for j in filled) / len(filled) / kept if counts[i] else 0.0
        p = reference[i] / sum(counts)
        if p:
            found += p * math.log(p / max(q, SMOOTHING / bins))
    return found


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, 100, 1024])
def test_the_measure_is_that_of_a_plain_loop(bits: int, symmetric: bool, size: int) -> None:
    values = drawn(3, size, seed=bits)
    values[1, ::3] = 0
    low, high = limits(values, symmetric)
    bins = bins_for(size)
    counts, middles = histogram(values, low, high, bins), centres(low, high, bins)
    assert counts.sum(-1).tolist() == (values != 0).sum(-1).tolist()
    for factor in (1.0, 0.61, 0.23):
        options = Affine(bits, symmetric=symmetric, scale_dtype="float32")
        scale, zero = parameters("w", low * factor, high * factor, options)
        found = divergence(counts, middles, scale, zero, bits)
        zeros = [2 ** (bits - 1)] * 3 if zero is None else zero.tolist()
        for row in range(3):
            expected = slow(
                values[row],
                float(low[row]),
                float(high[row]),
                float(scale[row]),
                zeros[row],
                bits,
            )
            assert float(found[row]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "per_tensor"), [(32, False), (-1, False), (-1, True)])
def test_it_is_never_worse_than_min_max_by_its_own_measure(
    bits: int, symmetric: bool, group_size: int, per_tensor: bool
) -> None:
    weight = drawn(8, 256, seed=bits)
    size = 32 if group_size == 32 else 256
    groups = weight.reshape(1, 1, -1) if per_tensor else weight.view(8, -1, size)
    low, high = limits(groups, symmetric)
    bins = bins_for(groups.shape[-1])
    counts, middles = histogram(groups, low, high, bins), centres(low, high, bins)

    def measured(search: str) -> Tensor:
        found = quantize("w", weight, Affine(bits, group_size, symmetric, per_tensor, search))
        return divergence(counts, middles, found.scale, found.zero_point, bits)

    assert (measured("kl") <= measured("minmax") + 1e-12).all()


def test_it_clips_rows_with_outliers_and_leaves_small_groups_near_min_max() -> None:
    weight = drawn(4, 4096, outliers=False)
    weight[:, 3] = 0.4
    by_row = {s: quantize("w", weight, Affine(4, -1, True, False, s)) for s in ("minmax", "kl")}
    assert (by_row["kl"].scale < 0.8 * by_row["minmax"].scale).all()
    few = {s: quantize("w", weight, Affine(8, 32, True, False, s)) for s in ("minmax", "kl")}
    # 64 bins, 256 levels: no level merges two bins, so min/max loses nothing.
    assert torch.equal(few["kl"].scale, few["minmax"].scale)


def test_padding_and_pruned_weights_do_not_count() -> None:
    weight = drawn(4, 512)
    wider = torch.cat([weight, torch.zeros(4, 512)], dim=1)
    low, high = limits(weight, False)
    counts = [histogram(part, low, high, 512) for part in (weight, wider)]
    assert torch.equal(counts[0], counts[1])
    nothing = quantize("w", torch.zeros(2, 64), Affine(4, 32, scale_search="kl"))
    assert not dequantize(nothing).any()


def test_bins_follow_the_number_of_weights() -> None:
    assert [bins_for(n) for n in (1, 32, 64, 65, 128, 4096)] == [64, 64, 64, 128, 128, 2048]
    assert (FEWEST_BINS, MOST_BINS) == (64, 2048)


def test_a_grid_beyond_all_weights_diverges_without_bound() -> None:
    counts, middles = torch.tensor([[0.0, 0.0, 5.0]]), torch.tensor([[1.0, 2.0, 90.0]])
    scale, zero = torch.tensor([1.0]), torch.tensor([0], dtype=torch.uint8)
    assert divergence(counts, middles, scale, zero, 2).tolist() == [math.inf]
    assert divergence(counts * 0, middles, scale, zero, 2).tolist() == [0.0]
