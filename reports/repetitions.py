"""Repetitions: rows that differ in a seed, or in what was calibrated on, become one row.

`repeat` of the configuration says what makes repetitions: `seed` (the seed alone), `calibration`
(the seed or `data.calibration`), `none`. Records older than this option count as `seed`. A figure
of the merged row is the mean of its repetitions, with their standard deviation and the t interval
of the mean. Where every repetition answered the same samples, a sample of the merged row is its
mean over them; a comparison of such samples holds for these repetitions, while the interval over
repetitions says how far another seed may lie.

Cells that failed are no repetitions and stay rows of their own. Of cells that are equal in
everything (run by two versions of the code) none can be told to be the repetition, so their set
is not merged.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.record import Value
from reports import stats, words
from reports.rows import QUALITY, STATES, Row, Spread, family, mapping
from reports.tasks import questions

MODES = ("seed", "calibration", "none")
_NODES = ("method", "baseline", "model", "hardware", "suite", "data", "reference_dtype")
_AXES = ("model", "method", "bits", "group_size", "hardware", "suite", "data", "baseline")


def merged(rows: Sequence[Row], repeat: str | None = None) -> list[Row]:
    """Return `rows` with each set of repetitions as one row, at the place of its first."""
    sets: dict[str, list[Row]] = defaultdict(list)
    for index, row in enumerate(rows):
        sets[_key(row, repeat) or f"row {index}"].append(row)
    found: list[Row] = []
    for members in sets.values():
        varied = {_varied(row) for row in members}
        if len(members) > 1 and len(varied) == len(members):
            found.append(_merge(sorted(members, key=lambda row: _order(_varied(row)))))
        else:
            found += members
    return found


def _key(row: Row, repeat: str | None) -> str:
    """Return what repetitions of `row` have in common, empty where it can have none."""
    resolved = mapping(row.record.config.get("resolved"))
    mode = repeat or str(resolved.get("repeat", "seed"))
    if mode not in ("seed", "calibration") or "seed" not in resolved or not row.measured:
        return ""
    nodes = {name: _plain(resolved.get(name)) for name in _NODES}
    calibration = mapping(mapping(nodes["method"]).get("calibration"))
    if calibration:
        nodes["method"]["calibration"].pop("seed", None)
    if mode == "calibration" and isinstance(nodes["data"], dict):
        nodes["data"].pop("calibration", None)
    axes = [row.record.config.get(name) for name in _AXES]
    identity = [mode, row.random_weights, row.model_identity, axes, nodes]
    return json.dumps(identity, sort_keys=True, default=str)


def _plain(found: Any) -> Any:
    """Return a copy of `found` whose mappings may be changed."""
    if isinstance(found, Mapping):
        return {key: _plain(value) for key, value in found.items()}
    return found


def _varied(row: Row) -> tuple[str, str]:
    """Return the seed and the calibration text of `row`."""
    resolved = mapping(row.record.config.get("resolved"))
    text = mapping(resolved.get("data")).get("calibration")
    return str(resolved.get("seed")), str(text or "own")


def _order(varied: tuple[str, str]) -> tuple[Any, ...]:
    return words.natural(varied[1]), words.natural(varied[0])


def _merge(rows: Sequence[Row]) -> Row:
    """Return one row of several repetitions."""
    varied = [_varied(row) for row in rows]
    seeds, texts = ({pair[place] for pair in varied} for place in (0, 1))
    if len(texts) == 1:
        repeated = f"{len(rows)} seeds"
    else:
        repeated = f"{len(rows)} calibration" + (" texts" if len(seeds) == 1 else "s")
    names = [
        ", ".join([f"seed={seed}"] * (len(seeds) > 1) + [f"calibration={text}"] * (len(texts) > 1))
        for seed, text in varied
    ]
    members = tuple(
        replace(row, label=f"{row.label} ({name})") for row, name in zip(rows, names, strict=True)
    )
    keys = dict.fromkeys(key for row in rows for key in row.values)
    values: dict[tuple[str, str], Value] = {}
    spreads: dict[tuple[str, str], Spread] = {}
    for key in keys:
        found = [(row, row.values[key]) for row in rows if key in row.values]
        values[key] = _mean(found)
        spreads[key] = _spread([value.value for _, value in found])
    executions = [row.execution for row in rows if row.execution]
    return Row(
        rows[0].record,
        f"{rows[0].label} ({repeated})",
        values,
        max(executions, key=STATES.index, default=""),
        members,
        spreads,
        repeated,
    )


def _mean(found: Sequence[tuple[Row, Value]]) -> Value:
    first = found[0][1]
    samples = [value.samples for _, value in found]
    same = (
        family(first) in QUALITY
        and len({len(of_one) for of_one in samples}) == 1
        and len({questions(row, first) for row, _ in found}) == 1
    )
    pairs = zip(*samples, strict=True) if same else ()
    means = tuple(sum(of_sample) / len(found) for of_sample in pairs)
    value = sum(value.value for _, value in found) / len(found)
    return replace(first, value=value, stderr=None, samples=means)


def _spread(figures: Sequence[float]) -> Spread:
    if len(figures) < 2 or not all(map(math.isfinite, figures)):
        return Spread(len(figures), math.nan if len(figures) > 1 else 0.0, None)
    found = stats.spread(figures)
    interval = None if found is None else (found[1], found[2])
    return Spread(len(figures), statistics.stdev(figures), interval)
