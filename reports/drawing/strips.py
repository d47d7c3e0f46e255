"""The samples behind one value, drawn small: ticks where they are few, else a histogram.

A drawing is the data of one SVG path on a field of `WIDTH` x `HEIGHT`, and what it shows stands
beside it in words, so that the page stays small and nothing is said by the picture alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.record import Value
from reports import words
from reports.rows import family
from reports.verdicts import scale_of

WIDTH, HEIGHT = 180, 26
MOST_TICKS, BARS = 60, 36
MOST_LISTED = 200
"""Samples that are listed one by one; more are left to the files of the cell."""


@dataclass(frozen=True)
class Strip:
    """What the samples of a value look like.

    Attributes:
        path: data of an SVG path, empty where nothing can be drawn.
        said: count, smallest, median and largest, or how many answers are right.
        listed: the samples in order, empty where they are more than `MOST_LISTED`.
    """

    path: str
    said: str
    listed: str


def strip(value: Value) -> Strip | None:
    """Return the drawing of the samples of `value`, None where it has none."""
    samples = value.samples
    if not samples:
        return None
    listed = "" if len(samples) > MOST_LISTED else " ".join(f"{sample:.6g}" for sample in samples)
    if family(value) == "tasks" and {*samples} <= {0.0, 1.0}:
        right = int(sum(samples))
        edge = round(WIDTH * right / len(samples))
        said = f"{right:,} of {words.count(len(samples), 'answer')} right"
        return Strip(f"M0 8H{edge}V20H0Z" if edge else "", said, listed)
    finite = sorted(sample for sample in samples if math.isfinite(sample))
    said = words.count(len(samples), "sample")
    if len(finite) < len(samples):
        said += f", {len(samples) - len(finite):,} not finite"
    if finite:
        said += f": {_range(value, finite)}"
    return Strip(_path(finite), said, listed)


def _range(value: Value, ordered: Sequence[float]) -> str:
    """Return smallest, median and largest of `ordered` samples in the unit that they have."""
    places = (ordered[0], _median(ordered), ordered[-1])
    if scale_of(value) in ("log", "negative_log"):
        # The figure is exp of their mean: they are losses, or log-likelihoods.
        low, middle, high = (words.significant(place) for place in places)
        unit = "nats"
    else:
        format_ = words.column_format(value.metric, places)
        low, middle, high = (format_.write(place) for place in places)
        unit = format_.unit
    return f"{low} to {high}, median {middle} {unit}".rstrip()


def _median(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _path(ordered: Sequence[float]) -> str:
    if not ordered:
        return ""
    low, high = ordered[0], ordered[-1]
    if not 0 < high - low < math.inf:
        return f"M{WIDTH // 2} 5V{HEIGHT}"
    if len(ordered) <= MOST_TICKS:
        factor = (WIDTH - 2) / (high - low)
        places = dict.fromkeys(round(1 + factor * (sample - low)) for sample in ordered)
        return "".join(f"M{place} 5V{HEIGHT}" for place in places)
    counts = np.histogram(ordered, BARS)[0]
    wide, tall = WIDTH // BARS, (HEIGHT - 2) / int(counts.max())
    return "".join(
        f"M{wide * place} {HEIGHT}v-{round(tall * count) or 1}h{wide - 1}V{HEIGHT}"
        for place, count in enumerate(counts.tolist())
        if count
    )
