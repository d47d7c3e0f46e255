"""Paired statistics of two rows on the same samples: how much they differ, and how sure that is.

Rows answer the same questions and read the same windows, so what is compared is the difference of
each pair; unpaired errors drown it. Answers that are right or wrong: reports/proportions.py. Losses
of windows, divergences, log-likelihoods and graded answers: reports/bootstrap.py. A loss below 3 %
is shown by two one-sided tests at 5 %, which is the 90 % interval within the margin (Schuirmann,
Journal of Pharmacokinetics and Biopharmaceutics 15:657-680, 1987); the p-values of a table's
methods are corrected by Holm's method (Scandinavian Journal of Statistics 6:65-70, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from reports.bootstrap import FEWEST, Array, Bootstrap, bootstrap, standard_error
from reports.proportions import (
    EXACT,
    detectable_difference,
    difference_interval,
    mcnemar,
    ratio_interval,
)

LEVEL = 0.95
"""Of every interval."""

ALPHA = 0.05
"""Of every test; two one-sided tests at it make an interval at 1 - 2 * ALPHA."""

POWER = 0.8
"""With which the detectable difference is found."""

ACCEPTABLE, UNACCEPTABLE = 0.03, 0.05
"""The documents' rule: a relative loss below 3 % is acceptable, above 5 % it is not."""

Scale = Literal["linear", "log", "negative_log"]
"""How samples make the figure: it is their mean (`linear`: accuracy, KL), exp(mean) of losses in
nats (`log`: perplexity), or exp(-mean) of log-likelihoods (`negative_log`)."""

Verdict = Literal["better", "worse", "equivalent", "not distinguishable"]
Acceptance = Literal["acceptable", "unacceptable", "not decided"]


@dataclass(frozen=True)
class Comparison:
    """One figure of two rows, taken on the same samples; `first` minus `second` everywhere.

    Attributes:
        n: pairs.
        higher_is_better: of the figure.
        first, second: the two figures (exp taken where the scale says so).
        difference, low, high: of the figures' means and its LEVEL interval: the figures' difference
            on the linear scale (0.012 is 1.2 points), their relative change on a log scale
            (0.012 is 1.2 % more perplexity). Infinite towards the worse where `first` alone is not
            finite, towards the better where `second` alone is not, nan where neither is.
        loss, loss_low, loss_high: relative loss of quality of `first`, positive is worse: share of
            `second`'s figure; intervals at 1 - 2 * 0.05 (two one-sided tests at 5 %). None where
            `second` is 0, cannot be told from 0, or is not finite.
        p: of the two-sided test that nothing differs.
        test: its name: `McNemar, exact`, `McNemar` (mid-p), `paired bootstrap`, `identical`, `too
            few differences` (below 8 pairs, or 8 that differ: p is 1, the intervals endless), `not
            finite` (p is 0 where one row is broken: no matter of chance; 1 where both are).
        lost, gained: answers right in `second` and wrong in `first`, and the other way round; None
            where samples are not 0 or 1.
        detectable: smallest difference (unit of `difference`) found with 80 % probability at 5 %;
            None where nothing can be said.
    """

    n: int
    higher_is_better: bool
    first: float
    second: float
    difference: float
    low: float
    high: float
    loss: float | None
    loss_low: float | None
    loss_high: float | None
    p: float
    test: str
    lost: int | None
    gained: int | None
    detectable: float | None


def compare(
    first: Sequence[float], second: Sequence[float], higher_is_better: bool, scale: Scale
) -> Comparison:
    """Return the comparison of two rows' samples, pair by pair and in the order of the data.

    Raises ValueError where there are no samples or not as many in both.
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(left) != len(right) or not len(left):
        raise ValueError(
            f"{len(left)} and {len(right)} samples cannot be paired: as many, and at least one"
        )
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return _compare_broken(left, right, higher_is_better, scale)
    if scale == "linear" and _are_answers(left, right, higher_is_better):
        return _compare_answers(left == 1, right == 1, higher_is_better)
    return _compare_scores(left, right, higher_is_better, scale)


def _are_answers(left: Array, right: Array, higher_is_better: bool) -> bool:
    both = np.concatenate((left, right))
    # Divergences that are all 0 are no answers that are all wrong.
    return bool(np.all((both == 0) | (both == 1)) and (higher_is_better or both.any()))


def _compare_answers(
    left: np.ndarray[tuple[int], np.dtype[np.bool_]],
    right: np.ndarray[tuple[int], np.dtype[np.bool_]],
    higher_is_better: bool,
) -> Comparison:
    n, both = len(left), int((left & right).sum())
    lost, gained = int((right & ~left).sum()), int((left & ~right).sum())
    low, high = difference_interval(lost, gained, n, LEVEL)
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None
    if both + lost:
        ratio_low, ratio_high = ratio_interval(both, lost, gained, 1 - 2 * ALPHA)
        ratio = (both + gained) / (both + lost)
        loss, loss_low, loss_high = _as_loss(
            ratio - 1, ratio_low - 1, ratio_high - 1, higher_is_better
        )
    flips = lost + gained
    return Comparison(
        n=n,
        higher_is_better=higher_is_better,
        first=(both + gained) / n,
        second=(both + lost) / n,
        difference=(gained - lost) / n,
        low=low,
        high=high,
        loss=loss,
        loss_low=loss_low,
        loss_high=loss_high,
        p=mcnemar(lost, gained),
        test="identical" if not flips else "McNemar, exact" if flips < EXACT else "McNemar",
        lost=lost,
        gained=gained,
        detectable=detectable_difference(flips, n, LEVEL, POWER),
    )


def _compare_scores(left: Array, right: Array, higher_is_better: bool, scale: Scale) -> Comparison:
    sign = -1.0 if scale == "negative_log" else 1.0
    differences = sign * (left - right)
    # Three graded answers of a hundred that differ are no evidence, whatever a resample says.
    differing = np.count_nonzero(differences) or len(differences)
    said = bootstrap(differences) if differing >= FEWEST else None
    low, high = said.interval(LEVEL) if said else (-math.inf, math.inf)
    detectable = said.detectable(LEVEL, POWER) if said else None
    difference = float(differences.mean())
    if scale == "linear":
        change = _relative_change(left, right, said is not None)
    else:
        ends = said.interval(1 - 2 * ALPHA) if said else (-math.inf, math.inf)
        change = (_expm1(difference), _expm1(ends[0]), _expm1(ends[1]))
        difference, low, high = _expm1(difference), _expm1(low), _expm1(high)
        detectable = None if detectable is None else _expm1(detectable)
    loss, loss_low, loss_high = (
        (None, None, None) if change is None else _as_loss(*change, higher_is_better)
    )
    return Comparison(
        n=len(left),
        higher_is_better=higher_is_better,
        first=_figure(left, scale),
        second=_figure(right, scale),
        difference=difference,
        low=low,
        high=high,
        loss=loss,
        loss_low=loss_low,
        loss_high=loss_high,
        p=said.p if said else 1.0,
        test=_test(said, differences),
        lost=None,
        gained=None,
        detectable=detectable,
    )


def _test(said: Bootstrap | None, differences: Array) -> str:
    if said is None:
        return "too few differences"
    return "paired bootstrap" if differences.any() else "identical"


def _relative_change(left: Array, right: Array, enough: bool) -> tuple[float, float, float] | None:
    """Return mean(left) / mean(right) - 1 and its interval at 1 - 2 * ALPHA.

    The error of both means counts: what is resampled is left - ratio * right over the mean of
    right (the delta method; Fieller's interval where the second mean is sure). None where the mean
    of right is not above twice its error: a share of it would mean nothing.
    """
    reference = float(right.mean())
    if reference <= 0:
        return None
    change = float(left.mean()) / reference - 1
    if not enough:
        return change, -math.inf, math.inf
    if reference <= 2 * standard_error(right):
        return None
    low, high = bootstrap((left - (1 + change) * right) / reference).interval(1 - 2 * ALPHA)
    return change, change + low, change + high


def _as_loss(
    change: float, low: float, high: float, higher_is_better: bool
) -> tuple[float, float, float]:
    return (-change, -high, -low) if higher_is_better else (change, low, high)


def _compare_broken(left: Array, right: Array, higher_is_better: bool, scale: Scale) -> Comparison:
    worse = -math.inf if higher_is_better else math.inf
    first_holds, second_holds = bool(np.isfinite(left).all()), bool(np.isfinite(right).all())
    one = first_holds or second_holds
    difference = math.nan if not one else -worse if first_holds else worse
    # The lost share is endless, and surely so, where `first` alone is broken.
    loss = math.inf if second_holds else None
    return Comparison(
        n=len(left),
        higher_is_better=higher_is_better,
        first=_figure(left, scale),
        second=_figure(right, scale),
        difference=difference,
        low=difference if one else -math.inf,
        high=difference if one else math.inf,
        loss=loss,
        loss_low=loss,
        loss_high=loss,
        p=0.0 if one else 1.0,
        test="not finite",
        lost=None,
        gained=None,
        detectable=None,
    )


def _figure(samples: Array, scale: Scale) -> float:
    # Infinities of both signs among the samples make nan; a loss of 710 nats overflows exp.
    with np.errstate(over="ignore", invalid="ignore"):
        mean = samples.mean()
        if scale == "linear":
            return float(mean)
        return float(np.exp(mean if scale == "log" else -mean))


def _expm1(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.expm1(value))


def holm(ps: Sequence[float]) -> list[float]:
    """Return the p-values adjusted by Holm's step-down method, in the order given.

    The smallest of m is multiplied by m, the next by m - 1 and so on; none falls below one that
    was smaller, none exceeds 1.
    """
    adjusted = [1.0] * len(ps)
    highest = 0.0
    for done, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        highest = max(highest, min(1.0, (len(ps) - done) * ps[place]))
        adjusted[place] = highest
    return adjusted


def verdict(comparison: Comparison, adjusted_p: float) -> Verdict:
    """Return what the data say of `first` against `second`.

    Better or worse where the test says so, however small the difference (`acceptance` says whether
    it matters); else equivalent where the loss is surely below ACCEPTABLE both ways, or where the
    samples are the same; else not distinguishable with this many samples.
    """
    if adjusted_p < ALPHA and comparison.difference != 0:
        gain = comparison.difference > 0
        return "better" if gain == comparison.higher_is_better else "worse"
    low, high = comparison.loss_low, comparison.loss_high
    if low is not None and high is not None and max(-low, high) < ACCEPTABLE:
        return "equivalent"
    # Two divergences of 0 have no share to lose, and are the same.
    same = comparison.low == comparison.high == 0
    return "equivalent" if same else "not distinguishable"


def acceptance(comparison: Comparison) -> Acceptance:
    """Return the documents' rule as one-sided tests: loss below 3 %, above 5 %, or neither."""
    if comparison.loss_high is not None and comparison.loss_high < ACCEPTABLE:
        return "acceptable"
    if comparison.loss_low is not None and comparison.loss_low > UNACCEPTABLE:
        return "unacceptable"
    return "not decided"


def spread(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Return mean, low and high of the LEVEL t interval over repetitions (seeds) of one method.

    It is the interval of the method's mean over seeds; None for fewer than two repetitions or
    where one is not finite.
    """
    taken = np.asarray(values, dtype=np.float64)
    if len(taken) < 2 or not np.isfinite(taken).all():
        return None
    mean = float(taken.mean())
    error = float(taken.std(ddof=1)) / math.sqrt(len(taken))
    half = float(stdtrit(len(taken) - 1, (1 + LEVEL) / 2)) * error
    return mean, mean - half, mean + half
