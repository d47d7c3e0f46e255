"""Standard errors of the plain kind, one formula in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BOOTSTRAP_DRAWS = 1000


def stderr_of_mean(samples: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent `samples`.

    None where there is only one sample, or where a sample is not finite.
    """
    values = np.asarray(samples, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def stderr_of_median(samples: Sequence[float], seed: int) -> float | None:
    """Return the bootstrap standard error of the median of `samples` (1000 draws, seeded).

    None where there are fewer than three samples.
    """
    values = np.asarray(samples, dtype=np.float64)
    if len(values) < 3:
        return None
    generator = np.random.default_rng(seed)
    draws = generator.choice(values, size=(BOOTSTRAP_DRAWS, len(values)))
    return float(np.median(draws, axis=1).std(ddof=1))


def relative_spread(samples: Sequence[float]) -> float:
    """Return the interquartile range of `samples` over their median: a measure of noise."""
    lower, middle, upper = np.quantile(np.asarray(samples, dtype=np.float64), (0.25, 0.5, 0.75))
    return float((upper - lower) / middle)


def empirical_quantile(samples: Sequence[float], share: float) -> float:
    """Return the smallest sample that at least `share` of all samples do not exceed.

    An observed value, never an interpolated one, so infinite samples keep their meaning.
    """
    return float(np.quantile(np.asarray(samples, np.float64), share, method="inverted_cdf"))
