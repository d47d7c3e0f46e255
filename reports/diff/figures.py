"""What became of each figure of matched cells: tested, counted, or timed.

Only figures of one metric under one protocol meet. Of quality, those that samples make are tested
on the same samples (`reports.verdicts`; p-values are Holm's over the cells of one figure). Sizes
and memory are counted. Of a speed the difference is held against the spread of both records'
timing, within one machine; between two machines it is shown and nothing is said of it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.record import Value
from reports import protocols, stats, words
from reports.diff.facts import busy, other_machine, other_model, other_text
from reports.diff.match import Pair
from reports.evidence import p_text, samples_text
from reports.rows import QUALITY, Row, family
from reports.stats import Comparison
from reports.tasks import hierarchy
from reports.verdicts import Judgement, compared, judgement
from reports.verdicts import pair as paired

Kind = Literal["tested", "counted", "timed", "plain"]

TIMED = frozenset({"speed", "energy", "latency", "serving", "load", "quantize"})
TIMED_BY = {
    "prefill_tokens_per_second": "ttft_seconds",
    "decode_tokens_per_second": "tpot_seconds",
    "sequences_per_second": "latency_seconds",
}
"""Figures without samples of their own -> whose samples they are the inverse of."""

KINDS: tuple[Kind, ...] = ("tested", "counted", "timed", "plain")
FIRST = (
    *("perplexity", "kl_mean", "top1_agreement", "equal_tokens"),
    *("artefact_bytes", "computed_bytes", "bits_per_weight", "peak_memory_bytes"),
    *("decode_tokens_per_second", "prefill_tokens_per_second", "decode_speedup"),
    *("prefill_speedup", "latency_seconds"),
)
"""Metrics that stand first among those of their kind."""

FEWEST_TIMES = 3
"""Timings below which a spread says nothing."""

MEMORY_NOISE = 0.1
"""Share by which the peak of a process may move by itself: it is measured once, and a cell of
50 MB that was run twice without any change moved by 5 %."""

BEYOND = "beyond noise"


@dataclass(frozen=True)
class Change:
    """One figure of one matched cell.

    Attributes:
        kind: how it was compared.
        first, second: the figure in A and in B, of `metric` under `protocol`.
        difference: B minus A, as text in the unit that fits.
        beside: what stands behind it: an interval, the spread of the timing, why there is none.
        p, lost, gained, samples: of a test, as text; empty where there was none.
        verdict: one or a few words; of quality those of `reports.verdicts`.
        loss: relative loss of B, positive is worse; None where it is no loss or no share.
        worse: whether B is worse, sizes by counting, quality by the test, speed beyond noise.
    """

    pair: Pair
    kind: Kind
    metric: str
    protocol: str
    first: float
    second: float
    difference: str
    verdict: str
    beside: str = ""
    p: str = ""
    lost: str = ""
    gained: str = ""
    samples: str = ""
    loss: float | None = None
    worse: bool = False

    @property
    def same(self) -> bool:
        """Whether nothing changed at all."""
        return self.verdict in ("identical", "same answers", "same")


@dataclass(frozen=True)
class Uncompared:
    """A figure of some matched cells that was not compared, and why."""

    metric: str
    names: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Figures:
    """All that became of the figures of matched cells."""

    changes: tuple[Change, ...]
    uncompared: tuple[Uncompared, ...]


def figures(pairs: Sequence[Pair]) -> Figures:
    """Return what became of every figure that matched cells have under one protocol."""
    why: dict[tuple[str, str], list[str]] = defaultdict(list)
    made: list[Change] = []
    columns: dict[tuple[str, str], list[tuple[Pair, Comparison]]] = defaultdict(list)
    tasks = hierarchy(row for pair in pairs for row in (pair.first, pair.second))
    for pair in pairs:
        for metric, reason in _unshared(pair):
            why[metric, reason].append(pair.name)
        for key, value in pair.second.values.items():
            if key not in pair.first.values or tasks.is_part(protocols.task_of(value.protocol)):
                continue
            found: Comparison | str = _refused(pair, value)
            if not found and compared(value):
                found = paired(pair.second, pair.first, *key)
            if isinstance(found, Comparison):
                columns[key].append((pair, found))
            elif found:
                why[value.metric, f"{value.protocol}: {found}"].append(pair.name)
            else:
                made.append(_untested(pair, value))
    for key, column in columns.items():
        adjusted = stats.holm([comparison.p for _, comparison in column])
        for (pair, comparison), p_holm in zip(column, adjusted, strict=True):
            rows = (pair.second, pair.first)
            made.append(_tested(pair, judgement(rows, pair.second.values[key], comparison, p_holm)))
    order = {pair.name: place for place, pair in enumerate(pairs)}
    made.sort(key=lambda c: (KINDS.index(c.kind), _place(c), order[c.pair.name]))
    return Figures(
        tuple(made),
        tuple(
            Uncompared(metric, tuple(names), reason)
            for (metric, reason), names in sorted(why.items())
        ),
    )


def _place(change: Change) -> tuple[object, ...]:
    first = FIRST.index(change.metric) if change.metric in FIRST else len(FIRST)
    return first, change.metric, words.natural(change.protocol)


def _unshared(pair: Pair) -> list[tuple[str, str]]:
    """Return (metric, why) of what one row has under no protocol of the other's."""
    found = []
    ends = [_protocols(row) for row in (pair.first, pair.second)]
    for key in dict.fromkeys([*ends[0], *ends[1]]):
        first, second = (end.get(key, set()) for end in ends)
        alone = [sorted(first - second), sorted(second - first)]
        if all(alone):
            text = f"protocol {', '.join(alone[0])} in A, {', '.join(alone[1])} in B"
            found.append((key[1], text))
        else:
            for names, name in zip(alone, "AB", strict=True):
                if names:
                    found.append((key[1], f"{', '.join(names)}: in {name} alone"))
    return found


def _protocols(row: Row) -> dict[tuple[str, str], set[str]]:
    """Return the protocols of each metric; every task is a metric of its own."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for value in row.values.values():
        task = protocols.task_of(value.protocol) if family(value) == "tasks" else ""
        found[task, f"{task} {value.metric}".strip()].add(value.protocol)
    return found


def _refused(pair: Pair, value: Value) -> str:
    """Return why a figure of quality must not be compared, empty where it may."""
    of_family = family(value)
    if of_family not in QUALITY:
        return ""
    return other_model(pair) or (other_text(pair) if of_family != "tasks" else "")


def _tested(pair: Pair, one: Judgement) -> Change:
    made = one.comparison
    key = one.value.metric, one.value.protocol
    before = pair.first.values[key]
    verdict, beside = one.word, made.test
    if math.isfinite(made.low) and math.isfinite(made.high):
        beside = f"{_fine(one, made.low)} to {_fine(one, made.high)}"
    if before.samples == one.value.samples:
        # Equal answers are no proof of equal models; equal losses of every window are.
        verdict = "same answers" if family(one.value) == "tasks" else "identical"
        beside = ""
    return Change(
        pair,
        "tested",
        *key,
        before.value,
        one.value.value,
        _fine(one, made.difference),
        verdict,
        beside=beside,
        p=p_text(one.p_holm),
        lost="" if made.lost is None else f"{made.lost:,}",
        gained="" if made.gained is None else f"{made.gained:,}",
        samples=samples_text(one),
        loss=made.loss,
        worse=verdict == "worse",
    )


def _fine(one: Judgement, change: float) -> str:
    """Return a change in its unit; one too small for the usual digits with a digit of its own."""
    text = one.write(change)
    if not change or re.search("[1-9]", text):
        return text
    unit = text.lstrip("+-0.")
    return f"{100 * change:+.1g}{unit}" if unit else text


def _untested(pair: Pair, value: Value) -> Change:
    before = pair.first.values[value.metric, value.protocol]
    of_family = family(value)
    if value.metric.endswith("_bytes") or of_family == "size":
        return _counted(pair, before, value)
    if of_family in TIMED:
        return _timed(pair, before, value)
    same = _equal(before.value, value.value)
    return Change(
        pair,
        "plain",
        value.metric,
        value.protocol,
        before.value,
        value.value,
        "" if same else _relative(before.value, value.value),
        "same" if same else "not tested",
    )


def _counted(pair: Pair, before: Value, after: Value) -> Change:
    difference = after.value - before.value
    text = words.signed(difference)
    if after.metric.endswith("_bytes"):
        text = f"{int(difference):+,} B"
    loss = difference / before.value if before.value else None
    verdict = "larger" if difference > 0 else "smaller"
    elsewhere = _elsewhere(pair) if _measured(after) else ""
    if elsewhere and difference:
        verdict = elsewhere
    return Change(
        pair,
        "counted",
        after.metric,
        after.protocol,
        before.value,
        after.value,
        text if difference else "",
        verdict if difference else "same",
        beside="" if loss is None or not difference else words.percent(loss),
        loss=loss,
        worse=difference > 0
        and not elsewhere
        and not (_measured(after) and (loss or 0) <= MEMORY_NOISE),
    )


def _elsewhere(pair: Pair) -> str:
    """Return what forbids to lay a difference of speed or memory at the software's door."""
    names = other_machine(pair)
    if not names:
        return ""
    return "other threads" if names.keys() <= {"cores", "threads"} else "another machine"


def _measured(value: Value) -> bool:
    """Whether bytes were measured in a process, not counted on disk or computed."""
    return value.protocol.startswith(("process_", "cuda_"))


def _timed(pair: Pair, before: Value, after: Value) -> Change:
    spreads = [spread(row, value) for row, value in ((pair.first, before), (pair.second, after))]
    known = [one for one in spreads if one is not None]
    ratio = after.value / before.value if before.value else math.nan
    better = after.higher_is_better
    slower = better is not None and (ratio < 1) == better and ratio != 1
    if _equal(before.value, after.value):
        verdict = "same"
    elif _elsewhere(pair):
        verdict = _elsewhere(pair)
    elif better is None:
        verdict = ""
    elif len(known) < 2:
        verdict = "noise not known"
    elif max(ratio, 1 / ratio if ratio else math.inf) - 1 <= sum(known):
        verdict = "within noise"
    elif any(busy(row) for row in (pair.first, pair.second)):
        verdict = "busy machine"
    else:
        verdict = f"{'worse' if slower else 'better'}, {BEYOND}"
    return Change(
        pair,
        "timed",
        after.metric,
        after.protocol,
        before.value,
        after.value,
        words.ratio(ratio),
        verdict,
        beside=" and ".join(words.UNKNOWN if s is None else f"{100 * s:.0f} %" for s in spreads),
        worse=verdict.startswith("worse"),
    )


def spread(row: Row, value: Value) -> float | None:
    """Return the interquartile range of the timings behind `value` over their median.

    None where fewer than FEWEST_TIMES are kept; a record without any may state it itself.
    """
    timed_by = TIMED_BY.get(value.metric, "")
    samples = value.samples
    if not samples and (timed_by, value.protocol) in row.values:
        samples = row.values[timed_by, value.protocol].samples
    if len(samples) >= FEWEST_TIMES:
        low, middle, high = np.quantile(np.asarray(samples, dtype=np.float64), (0.25, 0.5, 0.75))
        return float((high - low) / middle) if middle else None
    stated = row.values.get(("timing_spread", value.protocol))
    decoded = value.metric in ("decode_tokens_per_second", "tpot_seconds")
    return stated.value if stated is not None and decoded else None


def _equal(first: float, second: float) -> bool:
    return first == second or (math.isnan(first) and math.isnan(second))


def _relative(first: float, second: float) -> str:
    if not first or not math.isfinite(first) or not math.isfinite(second):
        return words.signed(second - first) if math.isfinite(second - first) else ""
    return words.percent(second / first - 1)
