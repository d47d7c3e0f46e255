"""What the pages show beside tables and figures: provenance, coverage, texts, failures, machines.

Each function turns rows into plain data; templates only lay it out. Rows that say the same are
named together.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from reports import words
from reports.rows import Group, Row, family, kept_back, kernels, mapping, sequence
from reports.summary import absent

FAMILIES = {
    "size": "size",
    "memory": "memory",
    "perplexity": "perplexity",
    "divergence": "divergence from the unquantized model",
    "generation": "greedy generation",
    "tasks": "tasks",
    "speed": "speed",
}
MAX_PROMPTS = 3
CHANGING_FACTS = ("load_average",)
"""Facts of an environment that differ from cell to cell on one machine."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class KernelLine:
    """One layer class and kernel of one or more rows."""

    labels: tuple[str, ...]
    layer: str
    kernel: str
    execution: str
    matrices: int
    share: str
    example: str
    decoding: str


@dataclass(frozen=True)
class Coverage:
    """How many weights are in the matrices that a method covers; what is left out and why."""

    labels: tuple[str, ...]
    share: str
    quantized: str
    total: str
    left_out: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Continuation:
    """What some rows generated: `same` as the unquantized model, then `differs`."""

    labels: tuple[str, ...]
    same: str
    differs: str


@dataclass(frozen=True)
class Prompt:
    """One prompt, the unquantized model's text, and every row's."""

    prompt: str
    reference: str
    continuations: tuple[Continuation, ...]


@dataclass(frozen=True)
class Machine:
    """One environment, and the rows that were measured in it."""

    facts: tuple[tuple[str, str], ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Said:
    """A sentence, and the rows it holds for."""

    labels: tuple[str, ...]
    text: str


def kernel_lines(group: Group) -> list[KernelLine]:
    """Return the kernels of the group's rows."""

    def lines_of(row: Row) -> tuple[tuple[str, str, str, int, str, str, str], ...]:
        found = kernels(row)
        total = sum(_count(entry.get("weights")) for entry in found)
        decoding = str(row.record.details.get("decoding") or "")
        return tuple(
            (
                str(entry.get("layer", "")),
                str(entry.get("kernel", "")),
                str(entry.get("execution") or "not stated"),
                _count(entry.get("matrices")),
                _share(_count(entry.get("weights")), total),
                str(entry.get("example", "")),
                decoding,
            )
            for entry in found
        )

    return [
        KernelLine(labels, *line)
        for lines, labels in _by_key(group.rows, lines_of)
        for line in lines
    ]


def coverages(group: Group) -> list[Coverage]:
    """Return how much of the model each row's method covers."""
    found = []
    for key, labels in _by_key(group.rows, lambda row: _text(row.record.details.get("coverage"))):
        facts = mapping(json.loads(key)) if key else {}
        total = _count(facts.get("total_weights"))
        if total:
            quantized = _count(facts.get("quantized_weights"))
            found.append(
                Coverage(
                    _all_or(labels, group),
                    _share(quantized, total),
                    f"{quantized:,}",
                    f"{total:,}",
                    _left_out(sequence(facts.get("left_out"))),
                )
            )
    return found


def prompts(group: Group, most: int | None = MAX_PROMPTS) -> list[Prompt]:
    """Return the first `most` prompts (None: all), each with the texts of the rows' models."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in group.rows:
        if kept_back(row, "generation"):
            continue
        for entry in sequence(row.record.details.get("generation"))[:most]:
            facts = {key: str(value) for key, value in mapping(entry).items()}
            texts = found.setdefault((facts.get("prompt", ""), facts.get("reference", "")), {})
            texts.setdefault(facts.get("text", ""), []).append(row.label)
    return [
        Prompt(prompt, reference, tuple(_continuations(reference, texts)))
        for (prompt, reference), texts in list(found.items())[:most]
    ]


def _continuations(reference: str, texts: Mapping[str, Sequence[str]]) -> Iterable[Continuation]:
    for text, labels in texts.items():
        same = _common_start(reference, text)
        # A text that only stops early is not an equal one.
        differs = text[len(same) :] or ("" if same == reference else "(ends here)")
        yield Continuation(tuple(labels), same, differs)


def machines(rows: Sequence[Row]) -> list[Machine]:
    """Return the distinct environments; a fact that changes by the minute is given as a range."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        facts = {k: v for k, v in row.record.environment.items() if k not in CHANGING_FACTS}
        if facts:
            found[_text(facts)].append(row)
    return [
        Machine(
            (*_facts(json.loads(key)), *_ranges(members)),
            tuple(dict.fromkeys(f"{row.label} ({row.model})" for row in members)),
        )
        for key, members in found.items()
    ]


def same_machine(found: Sequence[Machine]) -> bool:
    """Whether all environments name the same processor, card and host."""
    names = {tuple((k, v) for k, v in m.facts if k in ("cpu", "gpu", "host")) for m in found}
    return len(names) <= 1


def missing(group: Group) -> list[Said]:
    """Return which kinds of figures which rows lack, and why."""
    lacking: dict[tuple[str, str], list[str]] = defaultdict(list)
    found = {family(value) for row in group.rows for value in row.values.values()}
    # An encoder has no perplexity, writes nothing and decodes nothing.
    asked = {"size", "memory"} if "embedding" in found else {*FAMILIES}
    for row in group.rows:
        if not row.measured:
            continue
        present = {family(value) for value in row.values.values()}
        for of_family, name in FAMILIES.items():
            if of_family not in present and of_family in asked:
                lacking[row.label, _why(row, of_family)].append(name)
    by_text: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (label, reason), names in lacking.items():
        by_text[", ".join(names), reason].append(label)
    return [
        Said(_all_or(labels, group), f"{names}: {reason}")
        for (names, reason), labels in by_text.items()
    ]


def notes(group: Group) -> list[Said]:
    """Return the sentences that the records carry."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in group.rows:
        for details in [cell.record.details for cell in row.cells]:
            left_out = [f"speed left out, {why}" for why in _left_out_points(details)]
            for note in [*sequence(details.get("notes")), *left_out]:
                found[words.one_line(note)].append(row.label)
    return [
        Said(_all_or(list(dict.fromkeys(labels)), group), note) for note, labels in found.items()
    ]


def _left_out_points(details: Mapping[str, Any]) -> Sequence[Any]:
    return sequence(mapping(details.get("speed")).get("left_out"))


def calibrations(group: Group) -> list[Said]:
    """Return what each calibrated row was calibrated on."""
    cells = [cell for row in group.rows for cell in row.cells]
    keyed = _by_key(cells, lambda row: _text(mapping(row.record.details.get("calibration"))))
    return [
        Said(labels, ", ".join(f"{k} {v}" for k, v in _facts(json.loads(key))))
        for key, labels in keyed
        if key not in ("", "{}")
    ]


def models(group: Group) -> list[Said]:
    """Return what the records say of the model itself."""
    keyed = _by_key(group.rows, lambda row: _text(mapping(row.record.details.get("model"))))
    return [
        Said(_all_or(labels, group), ", ".join(f"{k} {v}" for k, v in _facts(json.loads(key))))
        for key, labels in keyed
        if key not in ("", "{}")
    ]


def is_embedded(group: Group) -> bool:
    """Whether the model is the demonstration model that the project carries."""
    return any(
        mapping(row.record.details.get("model")).get("kind") == "embedded"
        or row.model == "embedded"
        for row in group.rows
    )


def _common_start(first: str, second: str) -> str:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return first[:length]


def _by_key(rows: Iterable[Row], key_of: Callable[[Row], Key]) -> list[tuple[Key, tuple[str, ...]]]:
    """Return each key with the labels of its rows, in order."""
    found: dict[Key, list[str]] = defaultdict(list)
    for row in rows:
        found[key_of(row)].append(row.label)
    return [(key, tuple(labels)) for key, labels in found.items()]


def _all_or(labels: Sequence[str], group: Group) -> tuple[str, ...]:
    """Return `labels`, or one phrase where they are all the measured rows."""
    measured = [row.label for row in group.measured]
    if len(measured) > 2 and set(measured) <= set(labels):
        return ("all rows",)
    return tuple(labels)


def _why(row: Row, of_family: str) -> str:
    reason = absent(row, of_family)
    if reason == "simulated":
        return "the row is simulated: its values are floats, so such a figure would mean nothing"
    if reason == "random weights":
        return "the weights are random, so quality would mean nothing"
    if reason == "failed":
        return "the measure failed (see Failures)"
    return f"not measured (suite {row.suite or 'not stated'})"


def _left_out(entries: Sequence[Any]) -> tuple[tuple[str, str, str], ...]:
    """Return (why, weights, names) for each reason; names that differ in numbers are one."""
    by_reason: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        name, weights, why = (*sequence(entry), "", 0, "")[:3]
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", str(name))
        by_reason[str(why)][pattern].append(_count(weights))
    return tuple(
        (
            why,
            f"{sum(sum(counts) for counts in names.values()):,}",
            ", ".join(f"{n} ({len(c)}×)" if len(c) > 1 else n for n, c in names.items()),
        )
        for why, names in by_reason.items()
    )


def _facts(found: Any, above: str = "") -> tuple[tuple[str, str], ...]:
    """Return nested facts flat, as text: `packages.torch` becomes `torch`."""
    facts: list[tuple[str, str]] = []
    for key, value in mapping(found).items():
        if isinstance(value, Mapping):
            facts += _facts(value, str(key))
        elif value is not None:
            shown = str(value)
            if isinstance(value, int | float) and str(key).endswith("_bytes"):
                shown = words.figure(str(key), float(value))
            elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
                shown = f"{value:,}"
            facts.append((str(key).replace("_bytes", "").replace("_", " "), shown))
    return tuple(facts)


def _ranges(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    found = []
    for name in CHANGING_FACTS:
        numbers = [row.record.environment.get(name) for row in rows]
        present = [float(n) for n in numbers if isinstance(n, int | float)]
        if present:
            low, high = f"{min(present):.2f}", f"{max(present):.2f}"
            text = low if low == high else f"{low} to {high}"
            found.append((name.replace("_", " "), f"{text} when the cells began"))
    return tuple(found)


def _text(found: Any) -> str:
    """Return canonical JSON of `found`, empty for nothing: a key to find equal ones by."""
    return "" if found is None else json.dumps(found, default=str)


def _share(part: int, total: int) -> str:
    return f"{100 * part / total:.1f} %" if total else "–"


def _count(found: Any) -> int:
    return int(found) if isinstance(found, int | float) and not isinstance(found, bool) else 0
