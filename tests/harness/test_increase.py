"""The paired increase: its value, its interval's coverage, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.increase import paired_increase, window_losses
from harness.record import Record, Value
from kernels.errors import ConfigError


def test_loss_and_perplexity_of_a_constant_shift() -> None:
    baseline = [1.0, 2.0, 3.0]
    own = [1.1, 2.1, 3.1]
    assert paired_increase(own, baseline, "loss", 0.95).value == pytest.approx(0.05)
    perplexity = paired_increase(own, baseline, "perplexity", 0.95)
    assert perplexity.value == pytest.approx(math.expm1(0.1))
    # Every window says the same: nothing is left to doubt.
    assert perplexity.low == pytest.approx(perplexity.high)


def test_a_proportional_increase_of_loss_has_no_spread() -> None:
    baseline = [1.0, 2.0, 4.0, 3.0]
    found = paired_increase([1.03 * loss for loss in baseline], baseline, "loss", 0.99)
    assert (found.value, found.low, found.high) == pytest.approx((0.03, 0.03, 0.03))


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
@pytest.mark.parametrize("windows", [8, 24])
def test_the_interval_covers_the_truth_as_often_as_it_says(metric: str, windows: int) -> None:
    generator = np.random.default_rng(windows)
    truth = 0.04 if metric == "loss" else math.expm1(0.08)
    trials, covered = 2000, 0
    for _ in range(trials):
        # Windows differ more from one another than the two models do on one of them.
        baseline = generator.normal(2.0, 0.3, windows)
        change = 0.04 * baseline if metric == "loss" else np.full(windows, 0.08)
        own = baseline + change + generator.normal(0, 0.05, windows)
        found = paired_increase(own.tolist(), baseline.tolist(), metric, 0.9)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    # Three standard errors of a share of 2000 trials are 2 %.
    assert covered / trials == pytest.approx(0.9, abs=0.025)


def test_too_few_windows_give_no_interval_and_infinite_losses_are_above_every_limit() -> None:
    few = paired_increase([1.0, 2.0], [1.0, 1.0], "perplexity", 0.95)
    assert few.low is None
    assert few.interval == ""
    broken = paired_increase([1.0, math.nan, 1.0], [1.0, 1.0, 1.0], "loss", 0.95)
    assert broken.low == math.inf


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 windows cannot be paired with the baseline's 3"):
        paired_increase([1.0, 2.0], [1.0, 2.0, 3.0], "loss", 0.95)
    with pytest.raises(ConfigError, match="metric is 'accuracy'; it must be one of loss"):
        paired_increase([1.0], [1.0], "accuracy", 0.95)


def test_gptqs_windows_are_compared_where_there_are_two_protocols() -> None:
    values = tuple(
        Value("perplexity", "perplexity", protocol, 2.0, "perplexity", False, None, (0.7,))
        for protocol in ("text_llamacpp_512", "text_gptq_1024")
    )
    found = window_losses(Record("cell", "ok", {}, values))
    assert found is not None
    assert found.protocol == "text_gptq_1024"
    assert window_losses(Record("cell", "ok", {})) is None
