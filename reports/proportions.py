"""Paired right-or-wrong answers: McNemar's test, intervals of difference and ratio, power.

Two rows answer the same n questions. `gained` counts what `first` has right and `second` wrong,
`lost` the other way round; only these flips say anything about a difference. Test and intervals
hold their level in tests/reports/test_stats_simulation.py, few flips included:

- test: McNemar, exact below `EXACT` flips; above it mid-p, which was never above its level in
  9595 cases and gives away less than the continuity correction (Fagerland, Lydersen and Laake,
  "The McNemar test for binary matched-pairs data: mid-p and asymptotic are better than exact
  conditional", BMC Medical Research Methodology 13:91, 2013);
- difference: Tango's score interval ("Equivalence test and confidence interval for the difference
  in proportions for the paired-sample design", Statistics in Medicine 17:891-908, 1998);
- ratio: Bonett and Price's hybrid Wilson interval ("Confidence intervals for a ratio of binomial
  proportions based on paired data", Statistics in Medicine 25:3039-3047, 2006);
- detectable difference: Connor, "Sample size for testing differences in proportions for the
  paired-sample design", Biometrics 43:207-211, 1987.

The exact test is stricter than the score interval: with fewer than `EXACT` flips the interval may
leave out 0 where the test does not reject.
"""

from __future__ import annotations

import math
from functools import lru_cache

from scipy.optimize import brentq
from scipy.special import bdtr, gammaincinv, ndtri

EXACT = 25
"""Flips from which on McNemar's test is not the exact one."""

_FEWEST_FLIPS = 6
"""In one direction, that the exact test tells from chance: 2 / 2**6 < 0.05 < 2 / 2**5."""


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p-value that flips go either way alike; 1 without flips."""
    flips = lost + gained
    if not flips:
        return 1.0
    fewer = min(lost, gained)
    p = 2 * float(bdtr(fewer, flips, 0.5))
    if flips >= EXACT:
        p -= math.comb(flips, fewer) / 2**flips
    return min(1.0, p)


@lru_cache(maxsize=4096)
def difference_interval(lost: int, gained: int, n: int, level: float) -> tuple[float, float]:
    """Return Tango's interval of the share right in `first` minus that in `second`, -1 to 1.

    Where nothing flips it is 0 -+ z² / (n + z²), not a point.
    """
    z = float(ndtri((1 + level) / 2))

    def beyond(difference: float, limit: float) -> float:
        # The share lost that is most likely if the difference were this one.
        a = 2 * n
        b = (2 * n + lost - gained) * difference - lost - gained
        c = -lost * difference * (1 - difference)
        share = (math.sqrt(b * b - 4 * a * c) - b) / (2 * a)
        variance = n * (2 * share + difference * (1 - difference))
        # Multiplied by the deviation, so that nothing is divided by 0 at -1 and 1.
        return gained - lost - n * difference - limit * math.sqrt(max(variance, 0.0))

    # Beside the observed difference: where its deviation is 0 (no flips, or nothing else), it is
    # a root that means nothing.
    observed, aside = (gained - lost) / n, 1e-9
    low = -1.0 if observed == -1 else float(brentq(beyond, -1, observed - aside, args=(z,)))
    high = 1.0 if observed == 1 else float(brentq(beyond, observed + aside, 1, args=(-z,)))
    return low, high


def ratio_interval(both: int, lost: int, gained: int, level: float) -> tuple[float, float]:
    """Return Bonett and Price's interval of the share right in `first` over that in `second`.

    `both` counts what both have right. The share in `second` must not be 0.
    """
    right, reference = both + gained, both + lost
    n = both + gained + lost
    z = float(ndtri((1 + level) / 2)) * (
        math.sqrt((gained + lost + 2) / ((right + 1) * (reference + 1)))
        / sum(math.sqrt((1 - (x + 1) / (n + 2)) / (x + 1)) for x in (right, reference))
    )
    low, high = _wilson(right, n, z)
    reference_low, reference_high = _wilson(reference, n, z)
    return low / reference_high, high / reference_low


def _wilson(right: int, n: int, z: float) -> tuple[float, float]:
    centre = right + z * z / 2
    half = z * math.sqrt(right * (n - right) / n + z * z / 4)
    return max(0.0, (centre - half) / (n + z * z)), (centre + half) / (n + z * z)


def detectable_difference(flips: int, n: int, level: float, power: float) -> float | None:
    """Return the smallest difference that McNemar's test finds with this power; None if above 1.

    Connor's formula, at the share of flips seen. It is at least what brings the `_FEWEST_FLIPS`
    that the test needs (7.9 expected for 80 %): this also answers for rows without flips.
    """
    z, z_power = float(ndtri((1 + level) / 2)), float(ndtri(power))
    share = flips / n
    # The root of d * sqrt(n) = z * sqrt(share) + z_power * sqrt(share - d²).
    a, b, c = n + z_power**2, z * math.sqrt(share * n), (z**2 - z_power**2) * share
    connor = (b + math.sqrt(max(b * b - a * c, 0.0))) / a
    found = max(connor, float(gammaincinv(_FEWEST_FLIPS, power)) / n)
    return found if found <= 1 else None
