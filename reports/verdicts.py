"""What the samples say of each row against its baseline, figure by figure, once for a group.

A figure is compared where its samples make it (windows of a text, prompts, questions of a task)
and the baseline answered the same ones: same metric, same protocol, as many samples, and of a
task the same questions. The statistics are those of `reports.stats`; p-values are Holm's over
the rows of one column (a metric under one protocol in one group). The parts of a group of tasks
(subjects of MMLU) are not compared: the group's own score holds all their questions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from harness.record import Value
from reports import protocols, stats, words
from reports.rows import QUALITY, Group, Row, family
from reports.stats import Acceptance, Comparison, Scale, Verdict
from reports.tasks import chance, hierarchy, questions

SAME_FIGURE = 1e-3
"""Relative difference up to which the mean of samples counts as the figure itself."""

SAME_VECTOR = 1e-6
"""What rounding leaves of a cosine of 1."""

ONE_SIDED = 1.645
"""Standard errors that a score stands above chance with 95 % certainty."""

AT_CHANCE = "baseline at chance"

TONES = {
    "better": "better",
    "worse": "worse",
    "equivalent": "even",
    "identical": "even",
    "differs": "moved",
    "same answers": "open",
    "not distinguishable": "open",
    AT_CHANCE: "open",
}


@dataclass(frozen=True)
class Judgement:
    """One figure of one row against the baseline's.

    Attributes:
        row, baseline: who is compared.
        value: the row's figure.
        scale: how its samples make it.
        comparison: the statistics.
        p_holm: the comparison's p, adjusted over the rows of the column.
        verdict: what that says.
        acceptance: the rule of 3 and 5 %, None for figures that it is not made for.
        at_chance: whether the baseline's own score is not above that of random answers.
    """

    row: Row
    baseline: Row
    value: Value
    scale: Scale
    comparison: Comparison
    p_holm: float
    verdict: Verdict
    acceptance: Acceptance | None
    at_chance: bool

    @property
    def word(self) -> str:
        """The verdict, put otherwise where it would say too much.

        A divergence is 0 and an agreement 1 for the baseline itself, so whatever changes a model
        is "worse" in them: it differs. Equal answers are no proof of equal models.
        """
        if self.at_chance:
            return AT_CHANCE
        if self.comparison.test == "identical" and family(self.value) != "tasks":
            return "identical"
        if self.comparison.test == "identical" and self.verdict != "equivalent":
            return "same answers"
        if self.verdict == "worse" and self._against_itself:
            return "differs"
        return self.verdict

    @property
    def text(self) -> str:
        """The verdict and the rule in a few words."""
        if self.acceptance is None or self.word == AT_CHANCE:
            return self.word
        return _TEXTS.get((self.word, self.acceptance), f"{self.word}, {self.acceptance}")

    @property
    def tone(self) -> str:
        """The verdict as one word for a style sheet."""
        return TONES[self.word]

    @property
    def _against_itself(self) -> bool:
        bound = 1.0 if self.comparison.higher_is_better else 0.0
        found = self.baseline.values[self.value.metric, self.value.protocol].samples
        return family(self.value) != "tasks" and all(
            math.isclose(sample, bound, abs_tol=SAME_VECTOR * bound) for sample in found
        )

    def write_range(self, low: float, high: float) -> str:
        """Return `+0.1 to +0.3 points`."""
        ends = [self.write(end) for end in (low, high)]
        unit = next((f" {u}" for u in ("points", "%") if ends[1].endswith(u)), "")
        return f"{ends[0].removesuffix(unit)} to {ends[1]}"

    def write(self, change: float | None) -> str:
        """Return a change of the figure in its unit: percent, points or plain."""
        if change is None or not math.isfinite(change):
            return words.UNKNOWN
        if self.scale != "linear":
            return words.percent(change)
        kind = words.kind(self.value.metric)
        if kind in ("share", "agreement"):
            return words.points(change, 2 if kind == "agreement" else 1)
        return words.signed(change)


_WITHIN = f"(<\N{NO-BREAK SPACE}{100 * stats.ACCEPTABLE:g}\N{NO-BREAK SPACE}%)"
_TEXTS = {
    ("equivalent", "acceptable"): f"equivalent {_WITHIN}",
    ("not distinguishable", "not decided"): "not distinguishable",
    ("same answers", "not decided"): "same answers",
}
"""Verdict and rule where one after the other would say a thing twice."""


@dataclass(frozen=True)
class Judged:
    """Every comparison of a group by (cell, metric, protocol), and why a figure has none."""

    found: Mapping[tuple[str, str, str], Judgement]
    uncompared: Mapping[tuple[str, str, str], str]

    def get(self, row: Row, metric: str, protocol: str) -> Judgement | None:
        """Return the comparison of one figure of `row`, None where there is none."""
        return self.found.get((row.record.cell, metric, protocol))

    def of(self, metric: str, protocol: str) -> list[Judgement]:
        """Return the comparisons of one column, in the order of the group's rows."""
        return [one for key, one in self.found.items() if key[1:] == (metric, protocol)]


@lru_cache(maxsize=256)
def judge(group: Group) -> Judged:
    """Return the comparisons of all rows of `group` with their baselines."""
    tasks = hierarchy(group.rows)
    made: dict[tuple[str, str], list[tuple[Row, Row, Comparison]]] = defaultdict(list)
    uncompared: dict[tuple[str, str, str], str] = {}
    for row in group.measured:
        for (metric, protocol), value in row.values.items():
            if row.is_baseline or tasks.is_part(protocols.task_of(protocol)):
                continue
            baseline = group.baseline_of(row, metric, protocol)
            if baseline is None or not compared(value):
                continue
            found = pair(row, baseline, metric, protocol)
            if isinstance(found, str):
                uncompared[row.record.cell, metric, protocol] = found
            else:
                made[metric, protocol].append((row, baseline, found))
    judgements: dict[tuple[str, str, str], Judgement] = {}
    for (metric, protocol), column in made.items():
        adjusted = stats.holm([comparison.p for _, _, comparison in column])
        for (row, baseline, comparison), p_holm in zip(column, adjusted, strict=True):
            value = row.values[metric, protocol]
            judgements[row.record.cell, metric, protocol] = judgement(
                (row, baseline), value, comparison, p_holm
            )
    return Judged(judgements, uncompared)


def pair(first: Row, second: Row, metric: str, protocol: str) -> Comparison | str:
    """Return the comparison of one figure of two rows, or why there is none."""
    one, other = first.values[metric, protocol], second.values[metric, protocol]
    scale = scale_of(one)
    if scale is None or one.higher_is_better is None:
        return "it is no mean of samples"
    reason = _unlike((first, one), (second, other), scale)
    return reason or stats.compare(one.samples, other.samples, one.higher_is_better, scale)


def judgement(
    pair_: tuple[Row, Row], value: Value, comparison: Comparison, p_holm: float
) -> Judgement:
    """Return what `comparison` says of the first row's `value` against the second row's."""
    row, second = pair_
    said = stats.verdict(comparison, p_holm)
    ruled: Acceptance | None = None
    if family(value) in ("perplexity", "tasks"):
        ruled = stats.acceptance(comparison)
        if ruled == "unacceptable" and said != "worse":
            # A loss that does not outlast the correction for many rows condemns none of them.
            ruled = "not decided"
    return Judgement(
        row,
        second,
        value,
        scale_of(value) or "linear",
        comparison,
        p_holm,
        said,
        ruled,
        at_chance(second, second.values[value.metric, value.protocol]),
    )


def compared(value: Value) -> bool:
    """Whether `value` is a figure of quality that its samples make."""
    return bool(
        value.samples and value.higher_is_better is not None and scale_of(value) is not None
    )


def scale_of(value: Value) -> Scale | None:
    """Return how the samples of `value` make it, None where they are not known to."""
    of_family = family(value)
    if of_family == "perplexity":
        return "log" if value.metric == "perplexity" else None
    if of_family == "tasks" and value.unit == "perplexity":
        # Their samples are log-likelihoods of the answers, not losses.
        return "negative_log"
    return "linear" if of_family in QUALITY else None


def at_chance(row: Row, value: Value) -> bool:
    """Whether a score is not above that of random answers, as far as its samples can tell."""
    expected = chance(row, protocols.task_of(value.protocol)) if family(value) == "tasks" else None
    if expected is None or value.unit != "share" or not value.samples:
        return False
    error = value.stderr
    if error is None:
        error = math.sqrt(max(0.0, value.value * (1 - value.value)) / len(value.samples))
    return value.value - ONE_SIDED * error <= expected


def _unlike(first: tuple[Row, Value], second: tuple[Row, Value], scale: Scale) -> str:
    """Return why the samples of two figures are no pairs; empty where they are."""
    for row, value in (first, second):
        if not value.samples:
            return f"{row.label} has no samples of it"
        if not row.repetitions and not _makes(value.samples, scale, value.value):
            return "it is no mean of its samples"
    counts = [len(value.samples) for _, value in (first, second)]
    if counts[0] != counts[1]:
        return f"{counts[0]} samples and {counts[1]} are no pairs"
    asked = [questions(*one) for one in (first, second)]
    if all(asked) and asked[0] != asked[1]:
        return "the questions are not the same"
    return ""


def _makes(samples: Sequence[float], scale: Scale, figure: float) -> bool:
    """Whether `figure` is what the samples give on `scale`."""
    mean = sum(samples) / len(samples)
    try:
        made = mean if scale == "linear" else math.exp(mean if scale == "log" else -mean)
    except OverflowError:
        made = math.inf
    if math.isnan(made):
        return math.isnan(figure)
    return math.isclose(made, figure, rel_tol=SAME_FIGURE, abs_tol=1e-9)
