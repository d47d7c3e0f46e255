from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from reports.bootstrap import FEWEST, bootstrap
from reports.stats import acceptance, compare, holm, spread, verdict

EXAMPLES = settings(derandomize=True, deadline=None, database=None, max_examples=50)

UNCHANGED = compare(
    [1.0] * 510 + [0.0] * 490, [1.0] * 500 + [0.0] * 10 + [1.0] * 10 + [0.0] * 480, True, "linear"
)


def losses(seed: int, windows: int, shift: float = 0.0, noise: float = 0.02) -> list[list[float]]:
    """Losses of two rows on windows that differ much, which the rows share."""
    rng = np.random.default_rng(seed)
    second = rng.normal(3, 0.5, windows)
    return [(second + shift + rng.normal(0, noise, windows)).tolist(), second.tolist()]


# --- scores ----------------------------------------------------------------------------------


def test_losses_become_a_relative_change_of_perplexity() -> None:
    first, second = losses(1, 100, shift=0.04)
    comparison = compare(first, second, False, "log")
    said = bootstrap(np.array(first) - np.array(second))
    assert comparison.first == pytest.approx(math.exp(np.mean(first)))
    assert comparison.difference == pytest.approx(comparison.first / comparison.second - 1)
    assert (comparison.low, comparison.high) == pytest.approx(np.expm1(said.interval(0.95)))
    assert comparison.loss == comparison.difference
    assert (comparison.loss_low, comparison.loss_high) == pytest.approx(
        np.expm1(said.interval(0.9))
    )
    assert comparison.low < 0.04 < comparison.high
    assert (comparison.test, comparison.lost, comparison.gained) == ("paired bootstrap", None, None)


def test_log_likelihoods_are_losses_with_the_other_sign() -> None:
    first, second = losses(2, 60, shift=0.1)
    turned = compare([-x for x in first], [-x for x in second], False, "negative_log")
    assert turned == compare(first, second, False, "log")


def test_a_mean_that_should_be_high_is_lost_by_falling() -> None:
    first, second = (np.array(samples) for samples in losses(3, 60, shift=-0.3))
    comparison = compare(first.tolist(), second.tolist(), True, "linear")
    assert comparison.loss == pytest.approx(1 - first.mean() / second.mean())
    low = compare(first.tolist(), second.tolist(), False, "linear")
    assert low.loss == pytest.approx(-comparison.loss)
    assert low.loss_low is not None
    assert comparison.loss_high == pytest.approx(-low.loss_low)
    assert verdict(comparison, comparison.p) == "worse"
    assert verdict(low, low.p) == "better"


@EXAMPLES
@given(st.integers(0, 10**6), st.integers(FEWEST, 200), st.floats(-1, 1))
def test_p_is_below_5_percent_where_the_interval_excludes_0(
    seed: int, n: int, shift: float
) -> None:
    samples = np.random.default_rng(seed).gamma(2, 1, n) - 2 + 3 * shift / math.sqrt(n)
    said = bootstrap(samples)
    low, high = said.interval(0.95)
    assert (said.p < 0.05) == (low > 0 or high < 0)
    assert low <= said.mean <= high


def test_an_interval_is_at_least_students() -> None:
    samples = np.random.default_rng(4).normal(size=20)
    low, high = bootstrap(samples).interval(0.95)
    student = scipy_stats.ttest_1samp(samples, 0).confidence_interval(0.95)
    assert low <= student.low
    assert high >= student.high
    assert high - low < 1.15 * (student.high - student.low)


def test_neighbours_that_are_alike_make_an_interval_wider() -> None:
    rng = np.random.default_rng(5)
    alike = np.repeat(rng.normal(size=30), 8)
    mixed = rng.permutation(alike)
    assert bootstrap(alike).error == pytest.approx(bootstrap(mixed).error * math.sqrt(8), rel=0.4)


@pytest.mark.parametrize("n", [8, 23, 24, 25, 31, 100, 239, 240, 241, 5153])
def test_every_sample_is_in_a_block(n: int) -> None:
    samples = np.random.default_rng(n).normal(size=n)
    said = bootstrap(samples)
    assert said.blocks == (n if n < 24 else min(30, max(12, n // 8)))
    assert said.error == pytest.approx(samples.std(ddof=1) / math.sqrt(n), rel=0.5)
    if n < 24:
        assert said.error == pytest.approx(samples.std(ddof=1) / math.sqrt(n))


def test_few_windows_say_nothing() -> None:
    comparison = compare(*losses(6, FEWEST - 1, shift=1.0), False, "log")
    assert comparison.test == "too few differences"
    assert comparison.difference > 1
    assert (comparison.p, comparison.low, comparison.high) == (1, -1, math.inf)
    assert (comparison.loss_low, comparison.loss_high) == (-1, math.inf)
    assert comparison.detectable is None
    assert verdict(comparison, comparison.p) == "not distinguishable"
    assert acceptance(comparison) == "not decided"


def test_few_graded_answers_that_differ_say_nothing() -> None:
    second = np.random.default_rng(7).random(100)
    first = second.copy()
    first[[3, 40, 80]] += 0.5
    comparison = compare(first.tolist(), second.tolist(), True, "linear")
    assert comparison.test == "too few differences"
    assert (comparison.p, comparison.low, comparison.high) == (1, -math.inf, math.inf)


def test_the_same_samples_are_equivalent() -> None:
    samples = losses(8, 40)[0]
    for scale in ("linear", "log", "negative_log"):
        comparison = compare(samples, samples, False, scale)
        assert comparison.test == "identical"
        assert (comparison.difference, comparison.low, comparison.high) == (0, 0, 0)
        assert (comparison.p, comparison.detectable) == (1, None)
        assert verdict(comparison, 1.0) == "equivalent"


def test_divergences_of_the_reference_from_itself_are_no_answers() -> None:
    nothing = [0.0] * 20
    comparison = compare(nothing, nothing, False, "linear")
    assert comparison.lost is comparison.loss is None
    assert verdict(comparison, comparison.p) == "equivalent"
    some = np.random.default_rng(9).gamma(4, 0.01, 20).tolist()
    comparison = compare(some, nothing, False, "linear")
    assert comparison.loss is None
    assert verdict(comparison, comparison.p) == "worse"
    assert acceptance(comparison) == "not decided"


def test_no_share_of_what_cannot_be_told_from_0() -> None:
    rng = np.random.default_rng(10)
    second = rng.normal(0.001, 1, 60)
    comparison = compare((second + 0.1).tolist(), second.tolist(), False, "linear")
    assert comparison.difference == pytest.approx(0.1)
    assert comparison.loss is None


def test_a_constant_difference_is_certain() -> None:
    second = np.arange(16.0)
    comparison = compare((second + 0.5).tolist(), second.tolist(), False, "log")
    assert comparison.low == comparison.high == pytest.approx(math.expm1(0.5))
    assert comparison.p < 0.001
    assert comparison.detectable is None


def test_the_detectable_difference_of_losses_is_near_cohens() -> None:
    differences = np.random.default_rng(11).normal(0, 0.1, 240)
    comparison = compare((differences + 3).tolist(), [3.0] * 240, False, "log")
    assert comparison.detectable is not None
    assert math.log1p(comparison.detectable) == pytest.approx(2.8 * 0.1 / math.sqrt(240), rel=0.25)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], []), ([1.0, 0.0], [1.0])])
def test_what_cannot_be_paired_is_refused(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(first, second, True, "linear")


@pytest.mark.parametrize("broken", [math.inf, math.nan, -math.inf])
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_broken_row_is_worse_than_one_that_holds(broken: float, higher_is_better: bool) -> None:
    whole = losses(12, 20)[0]
    damaged = [*whole[:-1], broken]
    for scale in ("linear", "log", "negative_log"):
        comparison = compare(damaged, whole, higher_is_better, scale)
        assert (comparison.test, comparison.p) == ("not finite", 0)
        assert math.isinf(comparison.difference)
        assert verdict(comparison, 0.0) == "worse"
        assert acceptance(comparison) == "unacceptable"
        other = compare(whole, damaged, higher_is_better, scale)
        assert other.loss is None
        assert verdict(other, 0.0) == "better"
        assert acceptance(other) == "not decided"


def test_two_broken_rows_cannot_be_told_apart() -> None:
    comparison = compare([math.inf, -math.inf, 1.0], [math.nan, 1.0, 1.0], False, "log")
    assert math.isnan(comparison.first)
    assert math.isnan(comparison.difference)
    assert comparison.p == 1
    assert verdict(comparison, 1.0) == "not distinguishable"
    assert acceptance(comparison) == "not decided"


def test_a_perplexity_that_overflows_is_infinitely_worse() -> None:
    first, second = losses(13, 20, shift=800)
    comparison = compare(first, second, False, "log")
    assert comparison.first == comparison.difference == comparison.low == math.inf
    assert verdict(comparison, comparison.p) == "worse"
    assert acceptance(comparison) == "unacceptable"


# --- many methods, verdicts, repetitions -----------------------------------------------------


def test_holm_by_hand() -> None:
    # 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1]
    assert holm([]) == []


@EXAMPLES
@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm_keeps_the_order_and_stays_below_bonferroni(ps: list[float]) -> None:
    adjusted = holm(ps)
    ranked = [adjusted[place] for place in sorted(range(len(ps)), key=lambda place: ps[place])]
    assert all(lower <= higher for lower, higher in pairwise(ranked))
    assert all(p <= new <= min(1, len(ps) * p) for p, new in zip(ps, adjusted, strict=True))
    assert holm(ps[::-1]) == adjusted[::-1]


def test_verdicts() -> None:
    found = replace(UNCHANGED, loss=0.0, loss_low=-0.02, loss_high=0.02)
    assert verdict(found, 1.0) == "equivalent"
    assert verdict(replace(found, loss_high=0.03), 1.0) == "not distinguishable"
    assert verdict(replace(found, loss_low=-0.03), 1.0) == "not distinguishable"
    assert verdict(replace(found, loss_low=None, loss_high=None), 1.0) == "not distinguishable"
    # Surely worse, though by little: that is what `acceptance` is for.
    worse = replace(found, difference=-0.01)
    assert verdict(worse, 0.049) == "worse"
    assert acceptance(worse) == "acceptable"
    assert verdict(worse, 0.05) == "equivalent"
    assert verdict(replace(worse, higher_is_better=False), 0.01) == "better"


def test_acceptance() -> None:
    found = UNCHANGED
    assert acceptance(replace(found, loss_low=0.0, loss_high=0.029)) == "acceptable"
    assert acceptance(replace(found, loss_low=0.0, loss_high=0.03)) == "not decided"
    assert acceptance(replace(found, loss_low=0.05, loss_high=0.5)) == "not decided"
    assert acceptance(replace(found, loss_low=0.051, loss_high=0.5)) == "unacceptable"


def test_the_spread_over_seeds_is_a_t_interval() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert found == pytest.approx(
        (2, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), rel=1e-4
    )
    assert spread([5.0, 5.0]) == (5, 5, 5)
    assert spread([1.0]) is None
    assert spread([1.0, math.inf]) is None
