"""Observers on distributions whose right range is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.observers import (
    BINS,
    OBSERVERS,
    Grid,
    Histogram,
    MinMax,
    Observer,
    grid_of,
    make_observer,
    observe_inputs,
)
from tests.methods.int8_models import gpt2, llama, tokens

EXACT_IN_ANY_SPLIT = ("min_max", "percentile", "mse", "kl")
CLIPPING = ("percentile", "mse", "kl")


def observer(name: Any, symmetric: bool = False, percentile: float = 99.9) -> Observer:
    return make_observer(name, percentile, 0.01, symmetric)


def after(name: str, batches: list[Tensor], symmetric: bool = False) -> tuple[float, float]:
    seen = observer(name, symmetric)
    for batch in batches:
        seen.observe(batch)
    return seen.range()


def normal_with_outliers() -> Tensor:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    return torch.cat([values[:50_000], torch.tensor([90.0, -60.0]), values[50_000:]])


def uniform() -> Tensor:
    return torch.rand(50_000, generator=torch.Generator().manual_seed(0)) * 7 - 2


def rounded(x: Tensor, grid: Grid) -> Tensor:
    q = (x.double() / grid.scale).round() + grid.zero_point
    return (q.clamp(0, 255) - grid.zero_point) * grid.scale


def squared_error(x: Tensor, grid: Grid) -> float:
    return float((rounded(x, grid) - x).square().mean())


def test_min_max_is_exact() -> None:
    x = normal_with_outliers()
    assert after("min_max", [x]) == (-60.0, 90.0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", CLIPPING)
def test_outliers_are_clipped(name: str, symmetric: bool) -> None:
    low, high = after(name, [normal_with_outliers()], symmetric)
    assert -60 <= low < -2.5
    assert 2.5 < high < 90
    # On a symmetric grid only the larger magnitude counts.
    assert symmetric or low > -60


def test_kl_keeps_the_bulk_and_drops_the_outliers() -> None:
    low, high = after("kl", [normal_with_outliers()])
    assert -13 < low < -3.5
    assert 3.5 < high < 13


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", OBSERVERS)
def test_a_uniform_range_is_kept(name: str, symmetric: bool) -> None:
    low, high = after(name, [uniform()], symmetric)
    # A symmetric grid has no use for the lower end: only its larger magnitude counts.
    assert symmetric or low == pytest.approx(-2, abs=0.05)
    assert high == pytest.approx(5, abs=0.05)


@pytest.mark.parametrize("name", OBSERVERS)
def test_exact_zeros_do_not_decide(name: str) -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(3)).relu()
    low, high = after(name, [x])
    assert low == pytest.approx(0, abs=1e-4)
    assert high > 3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        normal_with_outliers(),
        uniform(),
        uniform() + 20,
        torch.randn(20_000, generator=torch.Generator().manual_seed(1)).relu(),
        torch.randn(20_000, generator=torch.Generator().manual_seed(2)).pow(5),
    ],
    ids=["outliers", "uniform", "offset", "relu", "heavy tails"],
)
def test_mse_is_no_worse_than_min_max_on_what_it_saw(data: Tensor, symmetric: bool) -> None:
    widest = grid_of(*after("min_max", [data]), symmetric)
    chosen = grid_of(*after("mse", [data], symmetric), symmetric)
    # The search sees bin centres: a thousandth is what that may cost.
    assert squared_error(data, chosen) <= squared_error(data, widest) * 1.001


def test_mse_halves_the_error_where_one_value_spoils_the_range() -> None:
    x = torch.cat([torch.randn(200_000, generator=torch.Generator().manual_seed(0)), torch.ones(1)])
    x[-1] = 30.0
    widest = squared_error(x, grid_of(*after("min_max", [x]), True))
    assert squared_error(x, grid_of(*after("mse", [x], True), True)) < 0.5 * widest


@pytest.mark.parametrize("name", EXACT_IN_ANY_SPLIT)
def test_any_split_and_order_gives_the_same_range(name: str) -> None:
    x = normal_with_outliers()
    pieces = list(x.split([1, 2, 997, 49_003, 49_999]))
    assert after(name, pieces) == after(name, [x])
    assert after(name, pieces[::-1]) == after(name, [x])


def test_percentile_is_the_quantile_at_each_end() -> None:
    seen = observer("percentile", percentile=90)
    seen.observe(uniform())
    low, high = seen.range()
    assert low == pytest.approx(-2 + 0.7, abs=0.03)
    assert high == pytest.approx(5 - 0.7, abs=0.03)


def test_percentile_100_is_min_max() -> None:
    seen = observer("percentile", percentile=100)
    seen.observe(normal_with_outliers())
    assert seen.range() == (-60.0, 90.0)


def test_moving_average_follows_the_batches() -> None:
    seen = make_observer("moving_average", 99.9, 0.25, False)
    for low, high in ((-1.0, 1.0), (-5.0, 2.0), (0.0, 3.0)):
        seen.observe(torch.tensor([low, high]))
    assert seen.range() == (pytest.approx(-1.5), pytest.approx(1.6875))


def test_histogram_counts_exactly_and_widens_by_merging() -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([0.25, -0.25, 0.0]))
    width = histogram.width
    histogram.add(torch.tensor([1000.0]))
    assert histogram.width > width
    assert int(histogram.counts.sum()) == 4
    once = Histogram()
    once.add(torch.tensor([1000.0, 0.0, -0.25, 0.25]))
    assert once.exponent == histogram.exponent
    assert torch.equal(once.counts, histogram.counts)
    centres, counts = histogram.points()
    assert float(counts.sum()) == 4
    assert float(centres.max()) == pytest.approx(1000, abs=histogram.width)


@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 2.0, 3e4, 1e30])
def test_histogram_uses_at_least_a_quarter_of_its_bins_on_one_side(magnitude: float) -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([magnitude, -magnitude]))
    assert BINS // 4 <= magnitude / histogram.width <= BINS // 2
    assert int(histogram.counts.sum()) == 2


@pytest.mark.parametrize("name", OBSERVERS)
def test_zeros_alone_give_a_grid_that_holds_zero(name: str) -> None:
    grid = grid_of(*after(name, [torch.zeros(5)]), False)
    assert grid.scale > 0
    assert float(rounded(torch.zeros(1), grid)) == 0


def test_grid_conventions() -> None:
    assert grid_of(-1.0, 2.0, True) == Grid(pytest.approx(2 / 127), 128)
    affine = grid_of(-1.0, 2.0, False)
    assert affine == Grid(pytest.approx(3 / 255), 85)
    # A range that does not reach zero is widened to it.
    assert grid_of(3.0, 5.1, False) == Grid(pytest.approx(5.1 / 255), 0)
    assert grid_of(-5.1, -3.0, False).zero_point == 255


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    with pytest.raises(ConfigError, match="NaN or infinite"):
        observer(name).observe(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("name", OBSERVERS)
def test_nothing_seen_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="never reached"):
        observer(name).range()
    with pytest.raises(ConfigError, match="empty batch"):
        observer(name).observe(torch.zeros(0))


def test_inputs_are_what_the_modules_are_called_with() -> None:
    model = llama()
    seen: list[Tensor] = []
    name = "model.layers.1.mlp.down_proj"
    ids = tokens(3, 8)
    observers = {name: MinMax(), "model.layers.0.self_attn.q_proj": MinMax()}
    observe_inputs(model, ids, observers)
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    low, high = observers[name].range()
    assert low == pytest.approx(float(seen[0].min()), rel=1e-4)
    assert high == pytest.approx(float(seen[0].max()), rel=1e-4)
    # Nothing is left behind on the model.
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_head_sees_every_position(build: Any) -> None:
    model = build()
    shapes: list[int] = []

    class Counting(MinMax):
        def observe(self, x: Tensor) -> None:
            shapes.append(x.shape[1])
            super().observe(x)

    observe_inputs(model, tokens(1, 8), {"lm_head": Counting()})
    assert shapes == [8]


def test_an_error_names_the_module() -> None:
    model = llama()
    model.model.layers[1].input_layernorm.weight = nn.Parameter(torch.full((64,), torch.nan))
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.self_attn\.q_proj: .*NaN"):
        observe_inputs(model, tokens(1, 8), {"model.layers.1.self_attn.q_proj": MinMax()})
