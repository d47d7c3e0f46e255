"""How much more a model loses than its baseline on the same text, with a paired interval.

Both read the same windows, so each window gives one difference, and what makes a window hard for
both drops out. The interval is Student's t over windows; for the ratio of two means it is taken of
the residuals `loss - ratio * baseline` (the delta method; Cochran, "Sampling Techniques", 1977,
section 6.4). It takes windows as independent of one another; the report's block bootstrap
(`reports.bootstrap`) does not, but needs more of them. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.record import Record, Value
from kernels.errors import ConfigError

METRICS = ("loss", "perplexity")
FEWEST = 3
"""Windows below which no interval is given: with two, t has one degree of freedom."""


@dataclass(frozen=True)
class Increase:
    """Relative increase over the baseline: 0.03 is 3 % more.

    Attributes:
        value: the point estimate.
        low, high: ends of the interval; None where there are too few windows.
        windows: how many were compared.
    """

    value: float
    low: float | None
    high: float | None
    windows: int

    @property
    def interval(self) -> str:
        """The interval as a sentence shows it; empty without one."""
        if self.low is None or self.high is None:
            return ""
        return f"{100 * self.low:+.2f} to {100 * self.high:+.2f} %"


def paired_increase(
    losses: Sequence[float], baseline: Sequence[float], metric: str, level: float
) -> Increase:
    """Return the increase of `metric` of the windows `losses` over the same of `baseline`.

    Args:
        losses: mean negative log-likelihood of each window, nats.
        baseline: the baseline's, of the same windows in the same order.
        metric: `loss` (mean loss over mean loss, less 1) or `perplexity` (exp of the mean
            difference, less 1).
        level: confidence of the two-sided interval, between 0 and 1.

    Raises:
        ConfigError: the metric is another, or the windows are not the same number.
    """
    # The driver composes in a moment; these libraries would double that.
    import numpy as np
    from scipy.special import stdtrit

    if metric not in METRICS:
        raise ConfigError(f"metric is {metric!r}; it must be one of {', '.join(METRICS)}")
    if len(losses) != len(baseline) or not losses:
        raise ConfigError(
            f"{len(losses)} windows cannot be paired with the baseline's {len(baseline)}"
        )
    own, other = np.asarray(losses, np.float64), np.asarray(baseline, np.float64)
    n = len(own)
    if not np.isfinite(own).all() or not np.isfinite(other).all():
        # A loss that is not finite is above every limit, and no interval makes it less.
        return Increase(math.inf, math.inf, math.inf, n)
    if metric == "perplexity":
        middle, residuals, scale = float((own - other).mean()), own - other, 1.0
    else:
        middle = float(own.mean() / other.mean() - 1)
        residuals, scale = own - (1 + middle) * other, float(other.mean())
    value = _shown(middle, metric)
    if n < FEWEST:
        return Increase(value, None, None, n)
    error = float(residuals.std(ddof=1)) / math.sqrt(n) / scale
    half = float(stdtrit(n - 1, (1 + level) / 2)) * error
    return Increase(value, _shown(middle - half, metric), _shown(middle + half, metric), n)


def _shown(middle: float, metric: str) -> float:
    """Return exp(middle) - 1 for perplexities (infinity on overflow), a ratio as it is."""
    if metric == "loss":
        return middle
    try:
        return math.expm1(middle)
    except OverflowError:
        return math.inf


def window_losses(record: Record) -> Value | None:
    """Return the perplexity whose samples a record is compared by; None where there is none.

    Of several protocols GPTQ's counts, else the first.
    """
    found = [v for v in record.values if v.metric == "perplexity" and v.samples]
    gptq = [v for v in found if "_gptq_" in v.protocol]
    return next(iter(gptq or found), None)
