"""The allocation: the solver against every mix there is, budgets, words and patterns."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from harness.load import meta_model
from kernels.errors import ConfigError
from methods.allocation import Budget, Costs, Map, limit_of, smallest, solve
from methods.layers import Scope, select
from tests.architectures import CONFIGS, tiny


def drawn(seed: int, rows: int = 5, columns: int = 4) -> tuple[Costs, Costs]:
    """Return KLs, which fall as the costs rise, and costs, as bits of matrices of four shapes."""
    generator = np.random.default_rng(seed)
    cost = np.sort(generator.integers(2, 17, (rows, columns)), axis=1)
    cost = cost * generator.choice([4096, 16384, 45056, 65536], (rows, 1))
    kl = -np.sort(-(10 ** generator.uniform(-6, -1, (rows, columns))), axis=1)
    return kl, cost.astype(np.float64)


def best(kl: Costs, cost: Costs, limit: float) -> tuple[float, float]:
    """Return least KL, and its least cost, over all mixes that cost at most `limit`."""
    rows = range(len(kl))
    mixes = itertools.product(range(kl.shape[1]), repeat=len(kl))
    found = [
        (sum(kl[r, mix[r]] for r in rows), sum(cost[r, mix[r]] for r in rows)) for mix in mixes
    ]
    return min((loss, price) for loss, price in found if price <= limit)


@pytest.mark.parametrize("seed", range(6))
def test_the_solver_finds_the_best_of_all_mixes(seed: int) -> None:
    kl, cost = drawn(seed)
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        least, most = smallest(cost), float(cost.max(axis=1).sum())
        limit = least + share * (most - least)
        mix = solve(kl, cost, limit)
        assert mix.cost <= limit
        assert mix.kl == pytest.approx(best(kl, cost, limit)[0], rel=1e-9)
        assert mix.solver["gap"] == 0
        assert mix.kl == pytest.approx(sum(kl[r, c] for r, c in enumerate(mix.chosen)))


def test_more_budget_is_never_worse() -> None:
    kl, cost = drawn(7, rows=30, columns=5)
    limits = np.linspace(smallest(cost), cost.max(axis=1).sum(), 12)
    losses = [solve(kl, cost, limit).kl for limit in limits]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_of_equal_mixes_the_cheaper_is_taken() -> None:
    kl = np.array([[0.5, 0.5, 0.1], [0.0, 0.0, 0.0]])
    cost = np.array([[3.0, 2.0, 9.0], [5.0, 4.0, 8.0]])
    assert solve(kl, cost, 8.0).chosen == (1, 1)
    # All the same, up to rounding below 0.
    assert solve(np.array([[0.0, -1e-9]]), np.array([[2.0, 1.0]]), 9.0).chosen == (1,)


def test_what_is_not_there_is_not_chosen() -> None:
    kl = np.array([[0.0, np.nan, 0.3], [0.0, np.inf, 0.4]])
    cost = np.array([[np.inf, 1.0, 5.0], [8.0, 1.0, 5.0]])
    assert solve(kl, cost, 10.0).chosen == (2, 2)
    assert solve(kl, cost, 13.0).chosen == (2, 0)
    with pytest.raises(RuntimeError, match="without an optimal mix"):
        solve(kl, cost, 9.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"average_bits": 4.5, "bytes": 10}, "has average_bits and bytes; give one of"),
        ({"average_bits": 0}, "average_bits is 0; it must be above 0"),
        ({"bytes": "3 MB"}, "bytes is '3 MB'; it must be above 0"),
        ({"decode_seconds": float("nan")}, "decode_seconds is nan; it must be above 0"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Budget(**options)


def test_a_budget_is_a_limit_on_costs() -> None:
    assert limit_of(Budget(average_bits=4.5), 1000) == 4500
    assert limit_of(Budget(bytes=700), 1000) == 700
    assert Budget().kind is None


def map_of(kind: str, scope: Scope) -> Map:
    model = tiny(kind)
    return Map(model, select(model, scope).matrices)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt"])
def test_words_mean_the_same_in_every_architecture(kind: str) -> None:
    places = map_of(kind, Scope(head=True, embeddings=True))
    first, last = places.matching("first"), places.matching("last")
    assert len(first) == len(last) > 0
    assert not set(first) & set(last)
    assert first == places.matching("0") == places.matching(0)
    assert last == places.matching("[1-9]")
    assert {places.places[name].block for name in last} == {1}
    assert {places.places[name].module for name in first} == {
        places.places[name].module for name in last
    }
    (head,), (embedding,) = places.matching("head"), places.matching("embedding")
    assert places.places[head].block is places.places[embedding].block is None
    assert set(places.matching("*")) == set(places.places)


def test_shell_patterns_mean_names() -> None:
    places = map_of("llama", Scope())
    assert places.matching("*.v_proj") == [
        f"model.layers.{block}.self_attn.v_proj" for block in (0, 1)
    ]
    assert not places.matching("v_proj")
    assert not places.matching("head")
    said = str(places.unmatched("rule", "v_proj"))
    assert said.startswith("rule 'v_proj' matches no matrix of the model; ")
    assert "block numbers 0 to 1" in said


def test_meta_models_have_places_too() -> None:
    model = meta_model(CONFIGS["llama"])
    assert len(Map(model, select(model, Scope()).matrices).matching("first")) == 7
