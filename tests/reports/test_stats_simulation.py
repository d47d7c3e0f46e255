"""Whether the statistics keep their word: coverage, false alarms and power on simulated rows.

2000 data sets where a rate must hold, so it is known to half a point. Window differences are as
skewed as those of the project's own records, between -1 and 1.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from reports.bootstrap import bootstrap
from reports.proportions import detectable_difference, mcnemar
from reports.stats import Comparison, compare, holm

DATA_SETS = 2000
METHODS = 8

Array = npt.NDArray[np.float64]


def skewed(rng: np.random.Generator, size: tuple[int, ...], skew: float) -> Array:
    """Return samples of mean 0, deviation 1 and this skewness (a gamma distribution's)."""
    shape = 4 / skew**2
    drawn = (rng.gamma(shape, 1, size) - shape) / math.sqrt(shape)
    return np.asarray(drawn * math.copysign(1, skew))


def covered(comparisons: list[Comparison], truth: float) -> float:
    return float(np.mean([found.low <= truth <= found.high for found in comparisons]))


def loss_covered(comparisons: list[Comparison], truth: float) -> float:
    held = [
        found.loss_low <= truth <= found.loss_high
        for found in comparisons
        if found.loss_low is not None and found.loss_high is not None
    ]
    assert len(held) == len(comparisons)
    return float(np.mean(held))


def compare_answers(n: int, flips: float, difference: float, right: float) -> list[Comparison]:
    """Compare pairs of rows that answer n questions and differ in the share `flips` of them."""
    rng = np.random.default_rng(1)
    gained, lost = (flips + difference) / 2, (flips - difference) / 2
    kinds = rng.choice(4, size=(DATA_SETS, n), p=[right - lost, gained, lost, 1 - right - gained])
    first, second = kinds <= 1, (kinds == 0) | (kinds == 2)
    return [compare(*rows, True, "linear") for rows in zip(first, second, strict=True)]


@pytest.mark.parametrize(
    ("n", "flips", "difference"),
    [(100, 0.1, 0.0), (100, 0.1, -0.03), (1000, 0.05, 0.0), (1000, 0.05, -0.02), (1000, 0.02, 0.0)],
)
def test_intervals_of_answers_cover(n: int, flips: float, difference: float) -> None:
    comparisons = compare_answers(n, flips, difference, right=0.6)
    assert 0.93 <= covered(comparisons, difference) <= 0.97
    # Two one-sided tests at 5 %: the share of the reference that is lost, 90 %.
    assert 0.88 <= loss_covered(comparisons, -difference / 0.6) <= 0.93


@pytest.mark.parametrize(
    ("windows", "skew"), [(8, 0.7), (24, 1.0), (24, -0.7), (200, 1.0), (200, -0.7)]
)
def test_intervals_of_perplexity_cover(windows: int, skew: float) -> None:
    rng = np.random.default_rng(2)
    text = rng.normal(3, 0.5, (DATA_SETS, windows))
    rows = text + 0.01 + 0.02 * skewed(rng, text.shape, skew)
    comparisons = [compare(*pair, False, "log") for pair in zip(rows, text, strict=True)]
    truth = math.expm1(0.01)
    assert 0.93 <= covered(comparisons, truth) <= 0.97
    assert 0.88 <= loss_covered(comparisons, truth) <= 0.94


def test_intervals_of_the_share_of_a_divergence_cover() -> None:
    rng = np.random.default_rng(3)
    windows = np.exp(0.3 * rng.normal(size=(3, DATA_SETS // 2, 24)))
    first, second = 0.0102 * windows[0] * windows[1], 0.01 * windows[0] * windows[2]
    comparisons = [compare(*pair, False, "linear") for pair in zip(first, second, strict=True)]
    assert 0.88 <= loss_covered(comparisons, 0.02) <= 0.94


def test_blocks_keep_most_of_what_neighbouring_windows_share() -> None:
    # Autocorrelation 0.3, 0.24, 0.19 and so on, a little more than that of the differences on 120
    # windows of WikiText-2 (0.3, 0.22, 0.15): something that stays for a while, and something of
    # each window's own.
    rng = np.random.default_rng(4)
    sets, windows, burn_in, kept = DATA_SETS // 2, 120, 50, 0.8
    steps = rng.normal(size=(sets, burn_in + windows)) * math.sqrt(1 - kept**2)
    for place in range(1, steps.shape[1]):
        steps[:, place] += kept * steps[:, place - 1]
    own = rng.normal(size=(sets, windows))
    differences = math.sqrt(0.375) * steps[:, burn_in:] + math.sqrt(0.625) * own
    held = [
        low <= 0 <= high for low, high in (bootstrap(row).interval(0.95) for row in differences)
    ]
    single = np.abs(differences.mean(axis=1)) <= 1.98 * differences.std(axis=1) / math.sqrt(windows)
    assert np.mean(single) < 0.72
    assert np.mean(held) > 0.86


@pytest.mark.parametrize("flips", [0.1, 0.02])
def test_methods_that_lose_nothing_raise_few_alarms_on_answers(flips: float) -> None:
    rng = np.random.default_rng(5)
    drawn = rng.multinomial(1000, [flips / 2, flips / 2, 1 - flips], size=(DATA_SETS, METHODS))
    alarms = [
        min(holm([mcnemar(int(lost), int(gained)) for lost, gained, _ in table])) < 0.05
        for table in drawn
    ]
    assert np.mean(alarms) <= 0.06


def test_methods_that_lose_nothing_raise_few_alarms_on_perplexity() -> None:
    rng = np.random.default_rng(6)
    skews = [1.0, -1.0, 0.7, -0.7, 0.5, -0.5, 0.3, -0.3]
    # The error of the row that all are compared with is in every difference.
    shared = rng.normal(0, 0.5, (DATA_SETS, 24, 1))
    tables = shared + np.stack([skewed(rng, (DATA_SETS, 24), skew) for skew in skews], axis=2)
    alarms = [min(holm([bootstrap(row).p for row in table.T])) < 0.05 for table in tables]
    assert np.mean(alarms) <= 0.06


@pytest.mark.parametrize(("n", "flips"), [(100, 10), (1000, 5), (1000, 20), (1000, 100)])
def test_the_detectable_difference_of_answers_is_found(n: int, flips: int) -> None:
    difference = detectable_difference(flips, n, 0.95, 0.8)
    assert difference is not None
    share = max(flips / n, difference)
    lost, gained = (share + difference) / 2, (share - difference) / 2
    rng = np.random.default_rng(7)
    drawn = rng.multinomial(n, [lost, gained, 1 - share], size=DATA_SETS)
    found = [mcnemar(int(lost), int(gained)) < 0.05 for lost, gained, _ in drawn]
    assert 0.75 <= np.mean(found) <= 0.85


@pytest.mark.parametrize("windows", [24, 200])
def test_the_detectable_difference_of_perplexity_is_found(windows: int) -> None:
    rng = np.random.default_rng(8)
    differences = rng.normal(0, 0.02, (DATA_SETS, windows))
    said = [compare(3 + row, np.full(windows, 3.0), False, "log") for row in differences[:300]]
    shift = float(np.mean([math.log1p(found.detectable or math.nan) for found in said]))
    found = [bootstrap(row + shift).p < 0.05 for row in differences]
    assert 0.75 <= np.mean(found) <= 0.85
