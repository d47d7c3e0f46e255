"""What the measured rows of a group say, by rules that stand beside each sentence.

Every sentence is computed from the rows; where no row answers a question, the sentence says so.
Where samples can decide, they do: what is acceptable follows from `reports.verdicts`, and methods
of equal bits and group size are ranked only where `reports.paired` tells them apart. Sizes and
speeds, and the margins around a perplexity, go by the figure alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from reports import protocols, stats, words
from reports.paired import compare, said
from reports.pareto import plane
from reports.rows import Group, Row, kept_back, mapping, number, sequence
from reports.summary import NOISY_SPREAD, decodes_otherwise, noisy, one_score_a_task
from reports.tasks import chance
from reports.verdicts import Judged, judge

MARGINS = (0.01, 0.03)
"""Increases of perplexity over the baseline that are asked about."""

DRIFT = 0.1
"""Change of the time per token from the first burst to the last from which it is mentioned."""

MOST_NAMED = 2
"""Figures that are named behind a row; of more, their number."""

BROKEN = 2.0
"""Ratio of perplexity to the baseline's above which a row is listed as damaged."""


@dataclass(frozen=True)
class Finding:
    """What was asked of a group, the answer, and the rule it follows from."""

    question: str
    answer: str
    rule: str


def findings(group: Group) -> list[Finding]:
    """Return what the rows of `group` say."""
    return [
        *_smallest_within(group),
        *_fastest(group),
        *_slower_than_baseline(group),
        *_fronts(group),
        *_acceptable(group),
        *_told_apart(group),
        *_broken(group),
    ]


def warnings(group: Group) -> list[str]:
    """Return what should make a reader of the group's figures careful."""
    found = []
    flagged = [row.label for row in group.rows if noisy(row)]
    if flagged:
        found.append(
            f"Timing of {_named(group, flagged)} was noisy: the interquartile range of the time "
            f"per token is above {100 * NOISY_SPREAD:g} % of its median. Measure again on a quiet "
            "machine before using these speeds."
        )
    found += _about_timing(group)
    otherwise = [row.label for row in group.rows if decodes_otherwise(row)]
    if otherwise:
        found.append(
            f"{words.listed(otherwise)} and the baseline do not decode in the same way, one in "
            "transformers and the other in compiled code (see the kernel table): the ratio of "
            "their decode speeds is that of two runtimes, too. hardware.decode=model lets "
            "transformers decode everything."
        )
    found += _out_of_order(group)
    found += _at_chance(group)
    below = [row.label for row in group.rows if _below_noise_floor(row)]
    if below:
        found.append(
            f"The divergence of {words.listed(below)} is not above the noise floor: as far as this "
            "text can tell, nothing changed."
        )
    nonfinite = [row.label for row in group.rows if _any_above(row, "nonfinite_logits", 0)]
    if nonfinite:
        found.append(f"Logits that are not finite were counted in {words.listed(nonfinite)}.")
    if not group.baselines:
        found.append("The baseline of this group was not measured: nothing is compared with it.")
    return found


def _smallest_within(group: Group) -> list[Finding]:
    protocol = group.main_protocol("perplexity")
    sizes = group.main_protocol("artefact_bytes")
    if protocol is None or sizes is None:
        return []
    found = []
    for margin in MARGINS:
        fitting: list[tuple[float, float, Row]] = []
        for row in group.rows:
            increase = _increase(group, row, protocol)
            size = row.get("artefact_bytes", sizes)
            if size is not None and increase is not None and increase <= 1 + margin:
                fitting.append((size.value, increase, row))
        rule = (
            f"Among rows whose perplexity ({protocol}) is at most {100 * margin:g} % above the "
            "baseline's, the one with the fewest bytes on disk; of equal ones, the lower "
            "perplexity."
        )
        if fitting:
            size_bytes, increase, row = min(fitting, key=lambda found: found[:2])
            ratio = _over_baseline(group, row, "artefact_bytes", sizes)
            answer = (
                f"{row.label}, {words.figure('artefact_bytes', size_bytes)}{ratio}, "
                f"perplexity {words.increase(increase)}"
            )
        elif group.baselines:
            answer = "no row but the baseline"
        else:
            continue
        question = f"Smallest within {100 * margin:g} % of the baseline's perplexity"
        found.append(Finding(question, answer, rule))
    return found


def _fastest(group: Group) -> list[Finding]:
    metric = "decode_tokens_per_second"
    protocol = group.main_protocol(metric)
    if protocol is None:
        return []
    pairs = [(value, row) for row in group.rows if (value := row.get(metric, protocol))]
    measured = [(value.value, row) for value, row in pairs if math.isfinite(value.value)]
    if len(measured) < 2:
        return []
    speed, row = max(measured, key=lambda pair: pair[0])
    text = f"{row.label}, {words.figure(metric, speed)}"
    speedup = row.get("decode_speedup", protocol)
    if row.is_baseline:
        text += ", the baseline itself"
    elif speedup is not None:
        text += f", {words.ratio(speedup.value)} the baseline timed in turns with it"
    text += "; its timing was noisy" if noisy(row) else ""
    return [
        Finding(
            "Fastest decode", text, f"The highest decode_tokens_per_second measured ({protocol})."
        )
    ]


def _slower_than_baseline(group: Group) -> list[Finding]:
    protocol = group.main_protocol("decode_speedup")
    if protocol is None:
        return []
    pairs = [(value, row) for row in group.rows if (value := row.get("decode_speedup", protocol))]
    slower = [row for value, row in pairs if value.value < 1]
    text = f"{len(slower)} of {words.count(len(pairs), 'row')}"
    if slower:
        text += f" ({words.listed([row.label for row in slower])})"
    converted = sum(row.execution == "dequantized" for row in slower)
    if converted:
        text += f"; of these, weights are converted at each call (dequantized) in {converted}"
    rule = f"decode_speedup below 1: the baseline timed in turns in the same process ({protocol})."
    return [Finding("Decode slower than the baseline", text, rule)]


def _fronts(group: Group) -> list[Finding]:
    found = []
    for metric, name in (
        ("artefact_bytes", "bytes on disk"),
        ("decode_tokens_per_second", "decode speed"),
    ):
        drawn = plane(group, metric)
        if drawn is not None:
            best = [point.row.label for point in drawn.points if point.best]
            quality = words.title(drawn.quality).lower()
            found.append(
                Finding(
                    f"Not beaten in both {quality} and {name}",
                    words.listed(best),
                    f"The Pareto front: no other row is at least as good in {quality} "
                    f"({drawn.perplexity_protocol}) and {metric} ({drawn.protocol}) and better in "
                    "one of them.",
                )
            )
    return found


def _told_apart(group: Group) -> list[Finding]:
    protocol = group.main_protocol("perplexity")
    return [
        Finding(
            f"Methods by perplexity at {found.title}",
            said(found),
            f"Mean loss ({protocol}) of the same {found.windows} windows, paired. Methods in "
            "braces cannot be told apart and are not ranked: the paired test finds no difference "
            "(5 %, Holm over all pairs of this table).",
        )
        for found in compare(group)
    ]


def _acceptable(group: Group) -> list[Finding]:
    """Say which rows are acceptable by the rule of 3 and 5 %, on which figures."""
    judged = judge(group)
    figures = _ruled_figures(group, judged)
    if not figures:
        return []
    good, bad, open_ = [], [], []
    for row in group.measured:
        found = {name: judged.get(row, *key) for name, key in figures.items() if key in row.values}
        if row.is_baseline or not any(found.values()):
            continue
        verdicts = {name: one.acceptance if one else None for name, one in found.items()}
        lost = [name for name, verdict in verdicts.items() if verdict == "unacceptable"]
        undecided = [name for name, verdict in verdicts.items() if verdict != "acceptable"]
        if lost:
            bad.append(_on(row, lost, figures))
        elif undecided:
            open_.append(_on(row, undecided, figures))
        else:
            good.append(_on(row, [n for n in found if len(found) < len(figures)], figures))
    margins = f"{100 * stats.ACCEPTABLE:g} %", f"{100 * stats.UNACCEPTABLE:g} %"
    of = words.listed([f"{name} ({protocol})" for name, (_, protocol) in figures.items()])
    rule = (
        f"On the same samples as the baseline, figure by figure: {of}. A loss below {margins[0]} "
        f"of the baseline's figure is acceptable, one above {margins[1]} is not; each is a "
        "one-sided test at 5 %, and what passes neither is not decided. A row named without a "
        "figure stands so on each of them."
    )
    return [
        Finding(question, words.listed(rows), rule)
        for question, rows in (
            (f"Acceptable (loss below {margins[0]})", good),
            (f"Not acceptable (loss above {margins[1]})", bad),
            ("Acceptable or not: cannot be decided", open_),
        )
        if rows
    ]


def _ruled_figures(group: Group, judged: Judged) -> dict[str, tuple[str, str]]:
    """Return the figures that the rule holds for, by name: perplexity and a score a task."""
    protocol = group.main_protocol("perplexity")
    wanted = {} if protocol is None else {"perplexity": ("perplexity", protocol)}
    for metric, of_task in one_score_a_task(group.rows):
        wanted[f"{protocols.task_of(of_task)} {metric}"] = (metric, of_task)
    return {
        name: key
        for name, key in wanted.items()
        if any(not one.at_chance for one in judged.of(*key))
    }


def _on(row: Row, names: Sequence[str], figures: Mapping[str, tuple[str, str]]) -> str:
    """Return the row's label, and the figures where they are not all; of many, their number."""
    if not names or len(names) == len(figures):
        return row.label
    if len(names) > MOST_NAMED:
        return f"{row.label} ({len(names)} of {len(figures)} figures)"
    return f"{row.label} ({words.listed(list(names))})"


def _at_chance(group: Group) -> list[str]:
    """Return a sentence on the tasks that the baseline answers no better than chance does."""
    scores: dict[float, dict[str, None]] = defaultdict(dict)
    for (_, metric, protocol), one in judge(group).found.items():
        if one.at_chance:
            score = one.baseline.values[metric, protocol].value
            task = protocols.task_of(protocol)
            random = chance(one.baseline, task) or 0.0
            scores[random][f"{task} {metric} ({100 * score:.1f} %)"] = None
    return [
        f"The baseline's own score of {words.listed(list(names))} is not above that of random "
        f"answers ({100 * random:.1f} %), so it says nothing of what a method costs."
        for random, names in scores.items()
    ]


def _broken(group: Group) -> list[Finding]:
    protocol = group.main_protocol("perplexity")
    if protocol is None or not group.baselines:
        return []
    damaged = []
    for row in group.rows:
        increase = _increase(group, row, protocol)
        if increase is not None and not increase <= BROKEN:
            damaged.append(row.label)
    if not damaged:
        return []
    return [
        Finding(
            "Perplexity more than doubles in",
            words.listed(damaged),
            f"Perplexity ({protocol}) above {BROKEN:g} times the baseline's, or not a number.",
        )
    ]


def _named(group: Group, labels: Sequence[str]) -> str:
    # A failed row may be among the labels, so their number says nothing.
    every = len(labels) > 1 and all(row.label in labels for row in group.measured)
    return "every row" if every else words.listed(labels)


def _about_timing(group: Group) -> list[str]:
    drifted, cached = [], []
    for row in group.rows:
        speed = {} if kept_back(row, "speed") else mapping(row.record.details.get("speed"))
        points = [mapping(point) for point in sequence(speed.get("points"))]
        ratios = [number(point.get("last_burst_over_first")) for point in points]
        if any(ratio is not None and abs(ratio - 1) > DRIFT for ratio in ratios):
            drifted.append(row.label)
        if any(point.get("weights_fit_into_caches") is True for point in points):
            cached.append(row.label)
    found = []
    if drifted:
        found.append(
            f"The time per token of {_named(group, drifted)} changed by more than {100 * DRIFT:g} "
            "% from the first burst to the last: the machine was not in a steady state."
        )
    if cached:
        found.append(
            f"The weights of {_named(group, cached)} fit into the processor's caches: these speeds "
            "do not carry over to models that have to be read from memory."
        )
    return found


def _out_of_order(group: Group) -> list[str]:
    """Return a sentence for each method whose perplexity falls where its bits do."""
    protocol = group.main_protocol("perplexity")
    series: dict[tuple[str, int | None], list[tuple[float, float, Row]]] = defaultdict(list)
    for row in group.rows if protocol is not None else ():
        value = row.get("perplexity", protocol or "")
        if value is not None and row.bits is not None and not row.is_baseline:
            series[row.method, row.group_size].append((row.bits, value.value, row))
    found = []
    for members in series.values():
        ordered = sorted(members, key=lambda member: -member[0])
        for (bits, high, wide), (fewer, low, narrow) in pairwise(ordered):
            if bits > fewer and low < high:
                found.append(
                    f"{narrow.label} has a lower perplexity than {wide.label}: fewer bits should "
                    "not help. Find out why before relying on either."
                )
    return found


def _increase(group: Group, row: Row, protocol: str) -> float | None:
    """Return perplexity over the baseline's; None for the baseline and where either is absent."""
    value = row.get("perplexity", protocol)
    if value is None or row.is_baseline:
        return None
    other = group.baseline_value(row, "perplexity", protocol)
    return None if other is None or other.value <= 0 else value.value / other.value


def _over_baseline(group: Group, row: Row, metric: str, protocol: str) -> str:
    value, other = row.get(metric, protocol), group.baseline_value(row, metric, protocol)
    if value is None or other is None or other.value <= 0:
        return ""
    return f" ({words.ratio(value.value / other.value)})"


def _below_noise_floor(row: Row) -> bool:
    for value in row.all_of("kl_mean"):
        floor = row.get("kl_noise_floor", value.protocol)
        if floor is not None and not row.is_baseline and value.value <= floor.value:
            return True
    return False


def _any_above(row: Row, metric: str, limit: float) -> bool:
    return any(value.value > limit for value in row.all_of(metric))
