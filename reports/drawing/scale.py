"""Scales of plain drawings: where a number lies on an axis, and which numbers are named."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LOG_FROM = 3.0
"""Ratio of the largest to the smallest value from which an axis of positive ones is logarithmic."""

SPREAD_FROM = 30.0
"""Ratio of the largest difference to the smallest of interest from which an axis is logarithmic."""

FEWEST_TICKS, MOST_TICKS = 4, 9
STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0))
"""Multiples of powers of ten that are named, the first that give enough."""


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`.

    `even` is the distance from 0 within which it is linear: endless for a linear axis, 0 for a
    logarithmic one, and between the two for one of differences of very unlike sizes.
    """

    low: float
    high: float
    even: float

    def place(self, value: float) -> float:
        """Return where `value` lies: 0 at the low end, 1 at the high one."""
        start, end = self._stretched(self.low), self._stretched(self.high)
        return (self._stretched(value) - start) / (end - start)

    @property
    def linear(self) -> bool:
        """Whether equal distances are equal differences everywhere."""
        return math.isinf(self.even)

    def ticks(self) -> list[float]:
        """Return the values to name, in order."""
        if self.linear:
            found = self._multiples()
        else:
            for steps in STEPS:
                found = self._powers(steps)
                if len(found) >= FEWEST_TICKS:
                    break
            found = self._with_even(found[:: 1 + len(found) // MOST_TICKS])
        return [tick for tick in found if self.low <= tick <= self.high]

    def _with_even(self, ticks: list[float]) -> list[float]:
        """Return `ticks` and the ends of the linear part, where those have room."""
        places = [self.place(tick) for tick in ticks]
        ends = [
            end for end in (-self.even, self.even) if self.even and self.low <= end <= self.high
        ]
        fitting = [end for end in ends if all(abs(self.place(end) - x) > 0.05 for x in places)]
        return sorted([*ticks, *fitting])

    def _multiples(self) -> list[float]:
        """Return some six multiples of one round step."""
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * times for times in (1, 2, 2.5, 5, 10) if unit * times >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        # Three steps of 0.1 are 0.3, not a bit more.
        return [float(f"{count * step:.12g}") for count in range(first, last + 1)]

    def _powers(self, steps: Iterable[float]) -> list[float]:
        reach = max(abs(self.low), abs(self.high))
        least = self.even or self.low
        first, last = math.floor(math.log10(least)), math.ceil(math.log10(reach))
        sizes = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        positive = sorted({size for size in sizes if size >= least})
        if not self.even:
            return [size for size in positive if self.low <= size <= self.high]
        both = [*(-size for size in reversed(positive)), 0.0, *positive]
        return [size for size in both if self.low <= size <= self.high]

    def _stretched(self, value: float) -> float:
        if self.linear:
            return value
        if not self.even:
            return math.log10(value)
        far = abs(value) / self.even
        return math.copysign(far if far <= 1 else 1 + math.log10(far), value)


def positive_scale(values: Iterable[float]) -> Scale:
    """Return a scale for positive `values`, logarithmic where they are of unlike sizes."""
    found = list(values)
    low, high = min(found), max(found)
    if high / low > LOG_FROM:
        margin = (high / low) ** 0.06
        return Scale(low / margin, high * margin, 0.0)
    margin = 0.08 * (high - low) or 0.05 * high
    return Scale(low - margin, high + margin, math.inf)


def difference_scale(ends: Iterable[float], estimates: Iterable[float], even: float) -> Scale:
    """Return a scale that holds 0 and the finite ones of `ends` and `estimates`.

    `even` is a difference of interest, around which it stays linear; 0 is none.
    """
    sizes = [abs(x) for x in estimates if math.isfinite(x) and x]
    found = [x for x in [*ends, 0.0, -even, even] if math.isfinite(x)]
    low, high = min(found), max(found)
    reach = max(-low, high) or 1.0
    # Where no difference is of interest, the side that holds none needs no room.
    wide = even
    even = even or max(min(sizes, default=reach), reach / 1e4)
    wide = wide or 0.3 * even
    if reach / even < SPREAD_FROM:
        margin = 0.04 * (high - low) or 1.0
        return Scale(low - margin, high + margin, math.inf)
    return Scale(1.25 * min(low, -wide), 1.25 * max(high, wide), even)
