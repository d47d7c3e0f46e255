"""Answers that are right or wrong: reports/proportions.py and what `compare` makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from reports import proportions
from reports.proportions import (
    detectable_difference,
    difference_interval,
    mcnemar,
    ratio_interval,
)
from reports.stats import Comparison, acceptance, compare, verdict

EXAMPLES = settings(derandomize=True, deadline=None, database=None, max_examples=50)

# Fagerland, Lydersen and Laake, "Statistical Analysis of Contingency Tables", 2017, chapter 8: the
# figures are those of the tests of their R package `contingencytables`. (both, gained, lost,
# neither) of airway hyper-responsiveness (Bentur 2009) and complete response (Cavo 2012).
BENTUR = (1, 1, 7, 12)
CAVO = (59, 6, 16, 80)


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[float], list[float]]:
    first = [1.0] * (both + gained) + [0.0] * (lost + neither)
    second = [1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither
    return first, second


def compared(both: int, gained: int, lost: int, neither: int) -> Comparison:
    return compare(*answers(both, gained, lost, neither), True, "linear")


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (7, 1, 0.0703125),  # Bentur: 2 * (1 + 8) / 2**8
        (16, 6, 0.052479),  # Cavo
        # Armitage and Berry, "Statistical Methods in Medical Research", 1994, page 127 (as in the
        # manual of StatsDirect, "McNemar and exact (Liddell) test").
        (2, 12, 0.0129),
        (0, 5, 0.0625),
        (6, 0, 0.03125),
        (4, 4, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_is_exact_for_few_flips(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p, abs=5e-5)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


def test_mcnemar_of_many_flips_is_the_mid_p_of_the_literature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = math.comb(28, 7) / 2**28
    below = sum(math.comb(28, fewer) for fewer in range(7)) / 2**28
    assert mcnemar(21, 7) == pytest.approx(2 * below + half)
    assert mcnemar(40, 40) == 1
    # Cavo's mid-p is published, though we would take the exact test for 22 flips.
    monkeypatch.setattr(proportions, "EXACT", 22)
    assert mcnemar(16, 6) == pytest.approx(0.034690, abs=5e-7)


@pytest.mark.parametrize(
    ("lost", "gained", "n", "level", "low", "high"),
    [
        (7, 1, 21, 0.95, -0.517, -0.026),  # Bentur
        (16, 6, 161, 0.95, -0.1240, -0.0054),  # Cavo
        (25, 28, 618, 0.90, -0.0148, 0.0247),  # R's PropCIs::scoreci.mp(25, 28, 618, 0.9)
        # By hand, with z² = 3.8415: no flips +- z² / (n + z²), all lost (z² - n) / (z² + n).
        (0, 0, 100, 0.95, -0.03699, 0.03699),
        (5, 0, 5, 0.95, -1.0, -0.13103),
        (0, 5, 5, 0.95, 0.13103, 1.0),
    ],
)
def test_the_interval_of_the_difference_is_tangos(
    lost: int, gained: int, n: int, level: float, low: float, high: float
) -> None:
    digits = 5e-4 if n == 21 else 5.1e-5
    assert difference_interval(lost, gained, n, level) == pytest.approx((low, high), abs=digits)


def test_the_interval_of_the_ratio_is_bonetts_and_prices() -> None:
    both, gained, lost, _ = CAVO
    assert ratio_interval(both, lost, gained, 0.95) == pytest.approx((0.7579, 0.9910), abs=5.1e-5)
    # All right twice: the ratio is 1, and how far it may be off depends on n alone.
    low, high = ratio_interval(100, 0, 0, 0.9)
    assert low < 1 < high
    assert low * high == pytest.approx(1)


def test_pairing_finds_what_an_unpaired_test_misses() -> None:
    # The example of EleutherAI/lm-evaluation-harness pull request 3868: 220 questions, unpaired
    # z-test (as in its model_comparator.py) 0.080, McNemar 0.008.
    both, gained, lost, n = 167, 7, 21, 220
    comparison = compared(both, gained, lost, n - both - gained - lost)
    rates = np.array([comparison.first, comparison.second])
    z = (rates[0] - rates[1]) / math.sqrt(float((rates * (1 - rates)).sum()) / (n - 1))
    assert 2 * scipy_stats.norm.sf(abs(z)) == pytest.approx(0.080, abs=0.0005)
    assert comparison.p == pytest.approx(0.008, abs=0.0005)
    assert comparison.high < 0
    assert verdict(comparison, comparison.p) == "worse"


def test_answers_are_counted_and_held_against_the_reference() -> None:
    comparison = compared(*BENTUR)
    assert (comparison.n, comparison.lost, comparison.gained) == (21, 7, 1)
    assert (comparison.first, comparison.second) == (2 / 21, 8 / 21)
    assert comparison.difference == pytest.approx(-6 / 21)
    assert comparison.test == "McNemar, exact"
    assert compared(100, 5, 20, 10).test == "McNemar"
    assert comparison.loss == pytest.approx(0.75)
    low, high = ratio_interval(1, 7, 1, 0.9)
    assert comparison.loss_low == pytest.approx(1 - high)
    assert comparison.loss_high == pytest.approx(1 - low)


def test_a_share_of_wrong_answers_is_lost_by_growing() -> None:
    comparison = compare([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], False, "linear")
    assert comparison.loss == pytest.approx(1)
    assert comparison.loss_low is not None
    assert comparison.loss_low < 1


@EXAMPLES
@given(st.tuples(*[st.integers(0, 60)] * 4).filter(lambda counts: sum(counts) > 0))
def test_rows_exchanged_mirror_the_comparison(counts: tuple[int, int, int, int]) -> None:
    first, second = answers(*counts)
    one, other = compare(first, second, True, "linear"), compare(second, first, True, "linear")
    assert (one.lost, one.gained) == (other.gained, other.lost)
    assert one.p == other.p
    assert one.low == pytest.approx(-other.high, abs=1e-8)
    assert -1 <= one.low <= one.difference <= one.high <= 1
    if one.loss is not None and one.loss_low is not None and one.loss_high is not None:
        assert one.loss_low <= one.loss <= one.loss_high


def test_no_answer_right_leaves_no_share_to_lose_and_no_certainty() -> None:
    comparison = compared(0, 0, 0, 50)
    assert comparison.loss is comparison.loss_low is comparison.loss_high is None
    assert comparison.test == "identical"
    assert comparison.p == 1
    assert comparison.high == pytest.approx(0.0714, abs=1e-4)  # z² / (50 + z²)
    assert verdict(comparison, 1.0) == "not distinguishable"
    assert acceptance(comparison) == "not decided"


def test_the_detectable_difference_of_answers() -> None:
    # Connor 1987: d * sqrt(n) = 1.96 * sqrt(flips) + 0.8416 * sqrt(flips - d²).
    found = detectable_difference(100, 1000, 0.95, 0.8)
    assert found is not None
    right = 1.95996 * math.sqrt(0.1) + 0.84162 * math.sqrt(0.1 - found**2)
    assert found * math.sqrt(1000) == pytest.approx(right, rel=1e-4)
    # Six flips one way are the fewest that the exact test tells from chance (2 / 2**6 = 0.03);
    # 7.9 expected bring six in 80 %.
    bound = detectable_difference(0, 1000, 0.95, 0.8)
    assert bound is not None
    assert scipy_stats.poisson.sf(5, 1000 * bound) == pytest.approx(0.8)
    assert bound == pytest.approx(7.9 / 1000, rel=2e-3)
    assert detectable_difference(0, 7, 0.95, 0.8) is None
