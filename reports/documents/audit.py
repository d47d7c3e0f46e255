"""What a report's rows say of the documents' claims.

`holds here` and `does not hold here` are said of the rows that are named, whose model and text are
not the documents'; where the claim names no metric, the rows' own is told and nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from reports import words
from reports.allocation import allocation_of, candidate_label, validate
from reports.calibration import spreads
from reports.compression import distillation_of, pruning_of
from reports.documents.evidence import (
    DIFFERS,
    FAILS,
    HOLDS,
    PARTLY,
    REPRODUCED,
    UNDECIDED,
    Evidence,
    Verdict,
)
from reports.jobs import title_of
from reports.rows import Group, Row, axes_label, mapping, sequence
from reports.rows import number as figure
from reports.sensitivity import edges
from reports.training import training_of

KEY_SHARE = 1.5
"""Share of the summed KL over an even share from which a block counts as a key one."""

SMALL = 1e8
"""Parameters below which the documents call a model small."""

INT8_LOSS, INT4_LOSS = 0.01, 0.05
"""Increase of perplexity that counts as little, and as much."""

MOST_NAMED = 4


def subjects(evidence: Evidence) -> set[str]:
    """Return the subjects that the report has rows or records about."""
    found = {name for name in ("deploy", "search") if evidence.jobs(name)}
    if evidence.analyses:
        found.add("sensitivity")
    for _, row in evidence.rows:
        found |= {name for name, of in _OF_ROWS.items() if of(row)}
    if any(spreads(group) for group in evidence.groups):
        found.add("calibration")
    return found


def increase(group: Group, row: Row) -> float | None:
    """Return the relative increase of the row's perplexity over the baseline's, if measured."""
    protocol = group.main_protocol("perplexity")
    value = row.get("perplexity", protocol) if protocol else None
    base = group.baseline_value(row, "perplexity", protocol) if protocol else None
    if value is None or base is None or not base.value > 0:
        return None
    return value.value / base.value - 1


def _figure(group: Group, row: Row, metric: str) -> float | None:
    protocol = group.main_protocol(metric)
    value = row.get(metric, protocol) if protocol else None
    return None if value is None else value.value


def _decided(cases: Sequence[bool], otherwise: str = UNDECIDED) -> str:
    """Return that a claim holds in all `cases`, in none of them, or `otherwise`."""
    return HOLDS if all(cases) else otherwise if any(cases) else FAILS


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"


def _told(row: Row, change: float) -> str:
    return f"{row.label} {words.spell(change, words.percent)}"


def _pruned(evidence: Evidence) -> Verdict | None:
    told = []
    for group, row in evidence.rows:
        change = increase(group, row)
        if not pruning_of(row) or change is None:
            continue
        plain = [
            f" ({_told(other, alone)} without pruning)"
            for other in group.measured
            if other.plain_method == "rtn"
            and (other.bits, other.group_size) == (row.bits, row.group_size)
            and (alone := increase(group, other)) is not None
        ]
        told.append(_told(row, change) + "".join(plain[:1]))
    if not told:
        return None
    return Verdict(
        UNDECIDED,
        f"The claim names no metric. Perplexity here: {'; '.join(told[:MOST_NAMED])}.",
    )


def _mixed(evidence: Evidence) -> Verdict | None:
    better, told = [], []
    for group, row in evidence.rows:
        weights: dict[str, float] = {}
        for entry in map(mapping, sequence(allocation_of(row).get("modules"))):
            name = candidate_label(row, str(entry.get("candidate", "")))
            weights[name] = weights.get(name, 0.0) + (figure(entry.get("weights")) or 0.0)
        most = max(weights, key=lambda name: weights[name], default="")
        if not most:
            continue
        for other in group.measured:
            if axes_label(other) != most or allocation_of(other):
                continue
            kl, size = (_figure(group, row, m) for m in ("kl_mean", "artefact_bytes"))
            old, less = (_figure(group, other, m) for m in ("kl_mean", "artefact_bytes"))
            if None in (kl, size, old, less) or not old or not less:
                continue
            better.append((kl or 0.0) < old)
            told.append(
                f"{row.label} against {other.label}: KL ×{(kl or 0.0) / old:.2f} for "
                f"×{(size or 0.0) / less:.2f} of the bytes"
            )
            break
    if not told:
        return None
    verdict = _decided(better)
    return Verdict(verdict, f"{'; '.join(told[:MOST_NAMED])}.")


def _protect(evidence: Evidence) -> Verdict | None:
    found = [
        (row, made)
        for group, row in evidence.rows
        if allocation_of(row) and (made := validate(group, row)).ratio is not None
    ]
    if not found:
        return None
    states = {made.verdict for _, made in found}
    verdict = HOLDS if states == {"better"} else FAILS if "better" not in states else UNDECIDED
    if states == {"not distinguishable"}:
        verdict = UNDECIDED
    told = [
        f"{row.label} has ×{made.ratio:.2f} of the uniform curve's KL at its bytes ({made.verdict})"
        for row, made in found
    ]
    return Verdict(verdict, f"{'; '.join(told[:MOST_NAMED])}.")


def _first_last(evidence: Evidence) -> Verdict | None:
    found = [(one, shares) for one in evidence.analyses if (shares := edges(one)) is not None]
    if not found:
        return None
    keys = [part >= KEY_SHARE * even for _, (*parts, even) in found for part in parts]
    told = [
        f"{one.scheme}: first block {_percent(first)}, last {_percent(last)} of the summed KL, "
        f"even {_percent(even)}"
        for one, (first, last, even) in found
    ]
    verdict = _decided(keys, PARTLY)
    return Verdict(verdict, f"{'; '.join(told[:MOST_NAMED])}.")


def _attention(evidence: Evidence) -> Verdict | None:
    told, higher = [], []
    for one in evidence.analyses:
        parts = {
            "q, k": [m for m in one.modules if m.kind.endswith(("q_proj", "k_proj"))],
            "mlp": [m for m in one.modules if "mlp" in m.kind],
        }
        rates = {
            name: sum(m.kl for m in modules) / sum(m.weights for m in modules) * 1e6
            for name, modules in parts.items()
            if sum(m.weights for m in modules)
        }
        if len(rates) == 2:
            higher.append(rates["q, k"] > rates["mlp"])
            told.append(
                f"{one.scheme}: KL a million weights {words.significant(rates['q, k'])} in Q and "
                f"K, {words.significant(rates['mlp'])} in the feed-forward part"
            )
    if not told:
        return None
    verdict = _decided(higher)
    return Verdict(verdict, f"{'; '.join(told[:MOST_NAMED])}.")


def _calibration(evidence: Evidence) -> Verdict | None:
    found = [one for group in evidence.groups for one in spreads(group)]
    whole = [(text, count) for text, count in found if text is not None and count is not None]
    if not whole:
        return None
    told = [
        f"The KL changes by up to ×{text:.2f} with the text and ×{count:.2f} with the number"
        for text, count in whole
    ]
    more = [text > count for text, count in whole]
    verdict = _decided(more)
    return Verdict(verdict, f"{'; '.join(told[:MOST_NAMED])}.")


def _qat_best(evidence: Evidence) -> Verdict | None:
    told, best = [], []
    for group, row in evidence.rows:
        own, facts = increase(group, row), training_of(row)
        if own is None or facts.get("kind") not in ("qat", "lsq"):
            continue
        # Trained without rounding, to compare with: held against nothing, and no case of QAT.
        if facts.get("equality") is None:
            continue
        others = [
            (change, other)
            for other in group.measured
            if not training_of(other)
            and not distillation_of(other)
            and (other.bits, other.group_size) == (row.bits, row.group_size)
            and (change := increase(group, other)) is not None
        ]
        if others:
            change, other = min(others, key=lambda pair: pair[0])
            best.append(own < change)
            told.append(f"{_told(row, own)} against {_told(other, change)}")
    if not told:
        return None
    verdict = _decided(best)
    return Verdict(verdict, f"Perplexity: {'; '.join(told[:MOST_NAMED])}.")


def _qat_int8(evidence: Evidence) -> Verdict | None:
    found = [
        (row, change)
        for group, row in evidence.rows
        if training_of(row).get("kind") == "qat"
        and row.bits == 8
        and (change := increase(group, row)) is not None
    ]
    if not found:
        return None
    verdict = HOLDS if all(change < INT8_LOSS for _, change in found) else FAILS
    told = "; ".join(_told(row, change) for row, change in found[:MOST_NAMED])
    return Verdict(verdict, f"Perplexity: {told}.")


def _small(evidence: Evidence) -> Verdict | None:
    lost: dict[float, list[tuple[Row, float]]] = {8: [], 4: []}
    for group, row in evidence.rows:
        model = mapping(row.record.details.get("model"))
        parameters, change = figure(model.get("parameters")), increase(group, row)
        small = parameters is not None and parameters < SMALL and row.plain_method == "rtn"
        if small and change is not None and row.bits in lost:
            lost[row.bits].append((row, change))
    if not lost[4]:
        return None
    told = [_told(row, change) for rows in lost.values() for row, change in rows[:2]]
    much = [change > INT4_LOSS for _, change in lost[4]]
    verdict = _decided(much)
    return Verdict(verdict, f"Perplexity: {'; '.join(told)}.")


def _distilled(evidence: Evidence) -> Verdict | None:
    told, good = [], []
    for group, row in evidence.rows:
        own, size = increase(group, row), _figure(group, row, "artefact_bytes")
        if not distillation_of(row) or own is None or size is None:
            continue
        rivals = [
            (change, other)
            for other in group.measured
            if not distillation_of(other)
            and (bytes_ := _figure(group, other, "artefact_bytes")) is not None
            and bytes_ <= size
            and (change := increase(group, other)) is not None
        ]
        change, rival = min(rivals, key=lambda pair: pair[0], default=(math.inf, row))
        good.append(own < change)
        beside = (
            "no other row is as small" if rival is row else f"{_told(rival, change)} is smaller"
        )
        told.append(f"{_told(row, own)}; {beside}")
    if not told:
        return None
    verdict = _decided(good)
    return Verdict(verdict, f"Perplexity: {'; '.join(told[:MOST_NAMED])}.")


def _search(evidence: Evidence) -> Verdict | None:
    told = []
    for record in evidence.jobs("search"):
        found = mapping(record.details.get("search"))
        rows = {str(r.get("cell")): str(r.get("label")) for r in map(mapping, found["rows"])}
        chosen = found.get("chosen")
        told.append(
            f"chosen {rows.get(str(chosen), chosen)}" if chosen else "no candidate was within"
        )
    return Verdict("found here", f"Search: {'; '.join(told[:MOST_NAMED])}.") if told else None


def _profiles(evidence: Evidence) -> Verdict | None:
    told, states = [], []
    for record in evidence.jobs("deploy"):
        found = mapping(record.details.get("deploy"))
        if found.get("profile"):
            passed = found.get("passed") is True
            states.append(passed)
            name = title_of(record).removeprefix("deploy ")
            told.append(f"{found['profile']} ({name}) {'passed' if passed else 'did not pass'}")
    if not told:
        return None
    verdict = _decided(states)
    return Verdict(
        verdict,
        f"With an accuracy gate, which the documents' pipeline lacks: {'; '.join(told[:8])}.",
    )


def _nanogpt(metric: str, claimed: float, margin: float) -> Callable[[Evidence], Verdict | None]:
    """Return the check of a ratio of int8_dynamic to FP32 on a nanoGPT."""

    def about(evidence: Evidence) -> Verdict | None:
        told, near, original = [], [], []
        for group, row in evidence.rows:
            if row.model != "nanogpt" or row.plain_method != "int8_dynamic":
                continue
            if metric == "artefact_bytes":
                own, base = _figure(group, row, metric), None
                for baseline in group.baselines:
                    base = base or _figure(group, baseline, metric)
                ratio = base / own if own and base else None
            else:
                ratio = _figure(group, row, metric)
            if ratio is not None:
                parameters = figure(mapping(row.record.details.get("model")).get("parameters"))
                told.append(f"{row.label}: {ratio:.2f}x, {parameters or 0:,.0f} parameters")
                near.append(abs(ratio / claimed - 1) <= margin)
                original.append(parameters == 10_745_088)
        if not told:
            return None
        why = f"Here {'; '.join(told[:MOST_NAMED])}."
        same = all(near) and all(original)
        if same and metric != "artefact_bytes":
            return Verdict(UNDECIDED, f"{why} As printed, but the document names no processor.")
        return Verdict(REPRODUCED if same else DIFFERS, why)

    return about


_OF_ROWS: Mapping[str, Callable[[Row], bool]] = {
    "pruning": lambda row: bool(pruning_of(row)),
    "mixed": lambda row: bool(allocation_of(row)),
    "training": lambda row: bool(training_of(row)),
    "distillation": lambda row: bool(distillation_of(row)),
    "nanogpt": lambda row: row.model == "nanogpt",
}

ABOUT: Mapping[str, Callable[[Evidence], Verdict | None]] = {
    "prune-accuracy": _pruned,
    "mixed-keeps-accuracy": _mixed,
    "protect-sensitive": _protect,
    "first-last-critical": _first_last,
    "attention-before-mlp": _attention,
    "calibration-quality": _calibration,
    "qat-best": _qat_best,
    "qat-int8-below-1b": _qat_int8,
    "small-models-lose": _small,
    "distill-small-and-good": _distilled,
    "search-threshold": _search,
    "profiles": _profiles,
    "nanogpt-ratio": _nanogpt("artefact_bytes", 3.52, 0.01),
    "nanogpt-speed": _nanogpt("decode_speedup", 1.46, 0.1),
}
"""Claim -> what the report's rows say of it."""
