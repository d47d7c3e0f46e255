"""Standard errors and quantiles against hand-computed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.measures.statistics import (
    empirical_quantile,
    relative_spread,
    stderr_of_mean,
    stderr_of_median,
)


def test_standard_error_of_a_mean() -> None:
    assert stderr_of_mean([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert stderr_of_mean([1.0]) is None
    assert stderr_of_mean([1.0, math.inf]) is None


def test_bootstrap_of_a_median_is_near_the_asymptotic_formula() -> None:
    samples = np.random.default_rng(0).normal(size=400).tolist()
    expected = math.sqrt(math.pi / 2) / math.sqrt(400)
    assert stderr_of_median(samples, seed=1) == pytest.approx(expected, rel=0.25)
    assert stderr_of_median(samples, seed=1) == stderr_of_median(samples, seed=1)
    assert stderr_of_median([1.0, 2.0], seed=1) is None


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert relative_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert relative_spread([2.0] * 4) == 0.0


def test_quantiles_are_observed_values() -> None:
    samples = [1.0, 2.0, 3.0, math.inf]
    assert empirical_quantile(samples, 0.5) == 2.0
    assert empirical_quantile(samples, 0.75) == 3.0
    assert empirical_quantile(samples, 0.9) == math.inf
