"""What a recommendation is asked for: `max_memory=8GB`, `method=gptq,awq`, read and checked.

Limits are `max_` or `min_` of a figure, exact conditions name what a row has to be. Units are those
of `job=deploy`: plain numbers are shares, bytes and seconds; GB are 1e9 bytes, GiB 2^30.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from reports import words
from reports.documents.advice import VOCABULARY
from reports.rows import STATES

Kind = Literal["share", "bytes", "seconds", "plain", "loss"]
"""What a limit is in; a `loss` of a task is a share of the baseline's score, or points."""

UNITS: dict[Kind, dict[str, float]] = {
    "share": {"": 1.0, "%": 0.01},
    "bytes": {"": 1.0, "B": 1.0, **{f"{p}B": 1e3**n for n, p in enumerate("kMGT", 1)}}
    | {f"{p}iB": 2.0 ** (10 * n) for n, p in enumerate("KMGT", 1)},
    "seconds": {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0},
    "plain": {"": 1.0},
    "loss": {"%": 0.01, "point": 0.01, "points": 0.01},
}
FEWEST_BYTES = 1e5
"""Without a unit, fewer than any model has: a forgotten unit."""

EXAMPLES: dict[Kind, str] = {
    "share": "3% or 0.03",
    "bytes": "8GB, 500MB or 2GiB",
    "seconds": "2s or 200ms",
    "plain": "20 or 0.5",
    "loss": "2points (of the score in percent) or 2% (of the baseline's score)",
}


@dataclass(frozen=True)
class Figure:
    """A figure that may be limited.

    Attributes:
        kind: what its limits are in.
        metrics: what it is of a row; the first that the row has.
        family: the family of those, as in `reports.rows`.
        priority: what a limit of it says of what counts, as the documents' trees have it.
    """

    kind: Kind
    metrics: tuple[str, ...]
    family: str
    priority: str


FIGURES = {
    "perplexity_increase": Figure("share", ("perplexity",), "perplexity", "accuracy"),
    "kl": Figure("plain", ("kl_mean",), "divergence", "accuracy"),
    "size": Figure("bytes", ("artefact_bytes", "computed_bytes"), "size", "size"),
    "memory": Figure("bytes", ("peak_memory_bytes",), "memory", "size"),
    "bits_per_weight": Figure(
        "plain", ("bits_per_weight", "computed_bits_per_weight"), "size", "size"
    ),
    "decode_tokens_per_second": Figure("plain", ("decode_tokens_per_second",), "speed", "speed"),
    "prefill_tokens_per_second": Figure(
        "plain", ("prefill_tokens_per_second",), "speed", "throughput"
    ),
    "ttft": Figure("seconds", ("ttft_seconds",), "speed", "speed"),
    "quantize_seconds": Figure("seconds", ("quantize_seconds",), "quantize", "quantizing"),
}
"""What may be limited, beside the loss of each task's score."""

LOSS = Figure("loss", (), "tasks", "accuracy")
EXACT = ("model", "hardware", "method", "execution", "priority", "purpose")
KNOWN = (
    "max_ or min_ before perplexity_increase, kl, size, memory, bits_per_weight, "
    "decode_tokens_per_second, prefill_tokens_per_second, ttft, quantize_seconds or <task>_loss; "
    "and model, hardware, method, execution, priority, purpose"
)

_QUANTITY = re.compile(r"(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*(.*)")


ROUNDING = 1e-9
"""What arithmetic leaves of a figure that is the limit itself: 80 % less 77.5 % is 2.5 points."""


class ConditionError(ValueError):
    """A condition that cannot be read; the message is one sentence for the user."""


@dataclass(frozen=True)
class Limit:
    """A figure that must not be above (`upper`) or below `value`.

    Attributes:
        name: of the figure, a key of `FIGURES` or `<task>_loss`.
        upper: whether the limit is from above.
        value: in the plain unit: a share, bytes, seconds, points as a share.
        text: the limit as given.
        relative: of a loss, whether it is a share of the baseline's score.
    """

    name: str
    upper: bool
    value: float
    text: str
    relative: bool = False

    @property
    def figure(self) -> Figure:
        """What is limited."""
        return FIGURES.get(self.name, LOSS)

    @property
    def task(self) -> str:
        """Name of the task whose loss is limited, empty for other figures."""
        return "" if self.name in FIGURES else self.name.removesuffix("_loss")

    @property
    def key(self) -> str:
        """The condition's name."""
        return f"{'max' if self.upper else 'min'}_{self.name}"

    def kept(self, value: float) -> bool:
        """Whether `value` keeps the limit, rounding of floats aside; NaN keeps none."""
        beyond = value > self.value if self.upper else value < self.value
        return not math.isnan(value) and (
            not beyond or math.isclose(value, self.value, rel_tol=ROUNDING)
        )


@dataclass(frozen=True)
class Conditions:
    """Everything that was asked for; of `exact`, any of a name's values will do."""

    limits: tuple[Limit, ...] = ()
    exact: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def priorities(self) -> tuple[str, ...]:
        """What counts: as stated, else what the limits are about."""
        return self.exact.get("priority") or tuple(
            dict.fromkeys(limit.figure.priority for limit in self.limits)
        )


def read_conditions(given: Sequence[str], tasks: Iterable[str]) -> Conditions:
    """Return the conditions `given` as key=value; `tasks` are those that rows have scores of.

    Raises:
        ConditionError: one is none of those known, is given twice, or its value cannot be read.
    """
    limits: dict[str, Limit] = {}
    exact: dict[str, tuple[str, ...]] = {}
    known_tasks = sorted(set(tasks))
    for text in given:
        key, separator, value = text.partition("=")
        key, value = key.strip(), value.strip()
        if not separator or not value:
            raise ConditionError(f"{text!r} is no condition: write key=value, as max_memory=8GB")
        if key in limits or key in exact:
            raise ConditionError(f"{key} is given twice")
        if key in EXACT:
            exact[key] = _names(key, value)
        else:
            limits[key] = _limit(key, value, known_tasks)
    return Conditions(tuple(limits.values()), exact)


def closest(name: str, known: Iterable[str]) -> str:
    """Return `; close ones are: ...`, empty where nothing is close."""
    close = difflib.get_close_matches(name, list(known), 3, 0.6)
    return f"; close: {', '.join(close)}" if close else ""


def _names(key: str, value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(","))
    known = {"execution": STATES, **VOCABULARY}.get(key)
    for name in names:
        if not name or (known and name not in known):
            listed = f": it is one of {', '.join(known)}" if known else ""
            raise ConditionError(f"{key}={value} names no {key}{listed}")
    return names


def _limit(key: str, value: str, tasks: Sequence[str]) -> Limit:
    bound, _, name = key.partition("_")
    if bound not in ("max", "min") or not (name in FIGURES or name.endswith("_loss")):
        known = [f"{b}_{n}" for b in ("max", "min") for n in FIGURES]
        known += [*EXACT, *(f"max_{task}_loss" for task in tasks)]
        raise ConditionError(f"{key} is no condition{closest(key, known)}; known are {KNOWN}")
    task = name.removesuffix("_loss")
    if name not in FIGURES and task not in tasks:
        listed = f"tasks with scores are {', '.join(tasks)}" if tasks else "no row has any score"
        raise ConditionError(f"{key} is of no task that was run{closest(task, tasks)}; {listed}")
    kind = FIGURES[name].kind if name in FIGURES else LOSS.kind
    amount, unit = _quantity(key, value, kind)
    return Limit(name, bound == "max", amount, value, kind == "loss" and unit == "%")


def _quantity(key: str, value: str, kind: Kind) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(value)
    amount = float(match[1]) * UNITS[kind].get(match[2], math.nan) if match else math.nan
    if match is None or not math.isfinite(amount):
        raise ConditionError(f"{key}={value} cannot be read: write it as {EXAMPLES[kind]}")
    if kind == "share" and not match[2] and amount >= 1:
        raise ConditionError(
            f"{key}={value} is a share of {100 * amount:g} %: write {amount:g}% if that is meant"
        )
    if kind == "bytes" and not match[2] and amount < FEWEST_BYTES:
        raise ConditionError(f"{key}={value} is {amount:g} bytes: write {value}GB or {value}MB")
    return amount, match[2]


def write(limit: Limit, value: float) -> str:
    """Return `value` of the limited figure in words, with its unit."""
    figure = limit.figure
    if figure.kind == "loss" and not limit.relative:
        return words.points(value, 1)
    if figure.kind in ("share", "loss"):
        return words.percent(value) if math.isfinite(value) else words.spell(value, str)
    return words.figure(figure.metrics[0], value)


def write_excess(limit: Limit, value: float) -> str:
    """Return how far `value` is beyond the limit: `1.1 GB above`, `5.0 tokens/s below`."""
    side = "above" if limit.upper else "below"
    distance = abs(value - limit.value)
    if not math.isfinite(distance):
        return f"beyond {limit.text}"
    if limit.figure.kind in ("share", "loss"):
        points = f"{100 * distance:,.0f}" if distance >= 0.1 else f"{100 * distance:.2g}"
        return f"{points} points {side} {limit.text}"
    return f"{words.figure(limit.figure.metrics[0], distance)} {side} {limit.text}"
