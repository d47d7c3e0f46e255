"""Search: the smallest artefact within a limit of the baseline, found by racing. Torch-free.

Every candidate reads a few windows of the text, those that stay read more, and the last ones all.
After each rung a candidate whose paired interval (`harness.increase`) lies wholly above the limit
is dropped, and once one lies wholly within, larger ones are set aside. On all windows the point
estimate decides, smallest first, as an exhaustive search would: what was set aside comes back where
nothing smaller is within. (Dropping what is clearly worse: Maron and Moore, "Hoeffding races",
1994; here with Student's t.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.increase import FEWEST, METRICS, Increase, paired_increase, window_losses
from harness.record import Record
from harness.units import SHARES, parse
from kernels.errors import ConfigError

Evaluate = Callable[[Sequence[int], int | None], Sequence[Record]]
"""Called with candidates and how many windows they read, None for all; returns their records."""


@dataclass(frozen=True)
class Search:
    """What is searched, and for what.

    Attributes:
        name: as the configuration's file is called.
        axes: Hydra overrides by key, each with its values: what is searched unless the command
            line names other axes or other values.
        metric: `loss` (mean negative log-likelihood) or `perplexity`.
        max_increase: limit of its relative increase over the baseline, `3%` or 0.03.
        rungs: windows of the rungs before the last, which reads all of the suite's.
        confidence: of the interval that drops a candidate.
    """

    name: str
    axes: Mapping[str, Any]
    metric: str = "loss"
    max_increase: str | float = "3%"
    rungs: Sequence[int] = (8, 24)
    confidence: float = 0.99

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(
                f"search.metric is {self.metric!r}; it must be one of {', '.join(METRICS)}"
            )
        rungs = list(self.rungs)
        if rungs != sorted(set(rungs)) or min(rungs, default=FEWEST) < FEWEST:
            raise ConfigError(
                f"search.rungs is {rungs}; it must be growing numbers of {FEWEST} or more windows, "
                "or empty for an exhaustive search"
            )
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(
                f"search.confidence is {self.confidence}; it must be at least 0.5 and below 1"
            )
        object.__setattr__(
            self, "max_increase", parse(self.max_increase, SHARES, "search.max_increase")
        )

    @property
    def limit(self) -> float:
        """The limit as a share."""
        return float(self.max_increase)

    @property
    def criterion(self) -> str:
        """What is looked for, in words."""
        return (
            f"the smallest artefact whose {self.metric} is at most {100 * self.limit:g} % above "
            "the baseline's"
        )


@dataclass
class _Candidate:
    """What is known of one candidate so far."""

    label: str
    cell: str = ""
    bytes: float | None = None
    increase: Increase | None = None
    verdict: str = ""


@dataclass
class Race:
    """The course of one search.

    Attributes:
        search: what is searched for.
        labels: the candidates, as a table names them.
        baseline: the baseline's loss of each window of the whole text, nats.
        evaluate: measures candidates.
    """

    search: Search
    labels: Sequence[str]
    baseline: Sequence[float]
    evaluate: Evaluate
    rungs: list[dict[str, Any]] = field(default_factory=list)
    chosen: int | None = None

    def __post_init__(self) -> None:
        self.candidates = [_Candidate(label) for label in self.labels]
        # The baseline has read all windows, once.
        self.made = len(self.baseline)

    def run(self) -> dict[str, Any]:
        """Race the candidates; returns `details["search"]` of the record."""
        racing = list(range(len(self.candidates)))
        aside: list[int] = []
        for windows in self.search.rungs:
            smaller = [c for c in racing if c not in aside]
            if windows >= len(self.baseline) or not smaller:
                break
            dropped = self._rung(smaller, windows)
            racing = [c for c in racing if c not in dropped]
            aside = self._set_aside(racing)
        for number in sorted(racing, key=self._bytes):
            if self.chosen is None:
                self._last(number)
        for candidate in self.candidates:
            candidate.verdict = candidate.verdict or "larger than the chosen one"
        return self._details()

    def _rung(self, racing: Sequence[int], windows: int) -> set[int]:
        """Evaluate `racing` on the first `windows`; returns those that are clearly worse."""
        self._measure(racing, windows)
        rung: dict[str, Any] = {"windows": windows, "tried": [], "dropped": []}
        dropped = set()
        for number in racing:
            one = self.candidates[number]
            rung["tried"].append(one.cell)
            low = None if one.increase is None else one.increase.low
            if low is not None and low > self.search.limit:
                one.verdict = f"clearly above the limit after {windows} windows"
            if one.verdict:
                dropped.add(number)
                rung["dropped"].append({"cell": one.cell, "why": one.verdict})
        self.rungs.append(rung)
        return dropped

    def _set_aside(self, racing: Sequence[int]) -> list[int]:
        """Return those of `racing` that need no further reading: one within is not larger."""
        within = [c for c in racing if self._surely_within(c)]
        if not within:
            return []
        smallest = min(within, key=self._bytes)
        return [c for c in racing if self._bytes(c) >= self._bytes(smallest)]

    def _surely_within(self, number: int) -> bool:
        found = self.candidates[number].increase
        return found is not None and found.high is not None and found.high <= self.search.limit

    def _last(self, number: int) -> None:
        """Evaluate one candidate on all windows, where the point estimate decides."""
        self._measure([number], None)
        one = self.candidates[number]
        last: dict[str, Any] = {"windows": len(self.baseline), "tried": [one.cell], "dropped": []}
        if one.increase is not None and one.increase.value <= self.search.limit:
            self.chosen = number
            one.verdict = "chosen"
        else:
            one.verdict = one.verdict or "above the limit"
            last["dropped"].append({"cell": one.cell, "why": one.verdict})
        self.rungs.append(last)

    def _measure(self, numbers: Sequence[int], windows: int | None) -> None:
        read = len(self.baseline) if windows is None else windows
        self.made += read * len(numbers)
        for number, record in zip(numbers, self.evaluate(numbers, windows), strict=True):
            one = self.candidates[number]
            one.cell = record.cell
            losses = window_losses(record)
            sizes = [v.value for v in record.values if v.metric == "artefact_bytes"]
            if record.status != "ok" or losses is None or not sizes:
                said = "; ".join(error.message for error in record.errors)
                one.verdict = f"not measured: {said or 'no perplexity or no stored size'}"
                one.increase = None
                continue
            one.bytes = sizes[0]
            one.increase = paired_increase(
                losses.samples, self.baseline[:read], self.search.metric, self.search.confidence
            )

    def _bytes(self, number: int) -> tuple[float, int]:
        """Order of size; of equals the first."""
        size = self.candidates[number].bytes
        return (float("inf") if size is None else size, number)

    def _details(self) -> dict[str, Any]:
        exhaustive = len(self.baseline) * (1 + len(self.candidates))
        order = sorted(range(len(self.candidates)), key=self._bytes)
        return {
            "criterion": self.search.criterion,
            "metric": self.search.metric,
            "limit": self.search.limit,
            "confidence": self.search.confidence,
            "rungs": self.rungs,
            "chosen": None if self.chosen is None else self.candidates[self.chosen].cell,
            "evaluations": {
                "made": self.made,
                "exhaustive": exhaustive,
                "saved": exhaustive - self.made,
                "unit": "windows",
            },
            "rows": [_row(self.candidates[number]) for number in order],
        }


def _row(one: _Candidate) -> dict[str, Any]:
    found = one.increase
    return {
        "cell": one.cell,
        "label": one.label,
        "bytes": one.bytes,
        "increase": None if found is None else found.value,
        "low": None if found is None else found.low,
        "high": None if found is None else found.high,
        "windows": None if found is None else found.windows,
        "verdict": one.verdict,
    }
