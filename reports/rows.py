"""One row of the report for each record: its axes, the values it may show, its baseline.

Two rules of the project are applied here, once, for every table and figure:

- a `simulated` row (rounded values stored as floats) carries no speed, memory or size figure;
- a row of random weights carries no quality figure.

What a rule keeps back stays in the record; `kept_back` says why it is not shown.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.record import Record, Value
from reports import words

FAMILY_OF_METRIC = {
    **dict.fromkeys(
        ("artefact_bytes", "bits_per_weight", "quantized_bytes", "head_bytes", "embedding_bytes"),
        "size",
    ),
    **dict.fromkeys(("other_bytes", "computed_bytes", "computed_bits_per_weight"), "size"),
    **dict.fromkeys(("quantize_seconds", "quantize_peak_bytes"), "quantize"),
    **dict.fromkeys(("load_seconds", "first_logits_seconds"), "load"),
    **dict.fromkeys(("peak_memory_bytes", "kv_cache_bytes"), "memory"),
    "perplexity": "perplexity",
}
"""Families of metrics that the harness measures itself; else a value's measure is its family."""

DEPLOYMENT = frozenset({"size", "memory", "speed", "load", "serving"})
"""What a simulated row cannot know: nothing was stored or run in the method's own format."""

QUALITY = frozenset({"perplexity", "divergence", "generation", "tasks"})
"""What random weights cannot know."""

_STATES = ("packed", "dequantized", "simulated")
_RESOLVED_NODES = ("method", "model", "hardware", "suite", "data")


def family(value: Value) -> str:
    """Return the kind of question that `value` answers: `speed`, `size`, `perplexity`, ..."""
    if value.measure == "tasks":
        return "tasks"
    return FAMILY_OF_METRIC.get(value.metric, value.measure)


@dataclass(frozen=True)
class Row:
    """One record as the report shows it.

    Attributes:
        record: what the cell left behind.
        label: method, bits, group size and whatever else tells the row from its neighbours.
        values: the values the row may show, by (metric, protocol).
        execution: the worst state of its matrices, empty where nothing was loaded.
    """

    record: Record
    label: str
    values: Mapping[tuple[str, str], Value]
    execution: str

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.record.config.get("model", ""))

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.record.config.get("method", ""))

    @property
    def bits(self) -> float | None:
        """Bits of a stored weight, None where there is no single width."""
        return number(self.record.config.get("bits"))

    @property
    def group_size(self) -> int | None:
        """Consecutive inputs that share a scale; -1 is per channel, None: no groups."""
        size = number(self.record.config.get("group_size"))
        return None if size is None else int(size)

    @property
    def hardware(self) -> str:
        """Name of the hardware."""
        return str(self.record.config.get("hardware", ""))

    @property
    def group_title(self) -> str:
        """Name of the group that the row belongs to."""
        return f"{self.model} on {self.hardware}"

    @property
    def suite(self) -> str:
        """Name of the suite, which chose the measures."""
        return str(self.record.config.get("suite", ""))

    @property
    def command(self) -> str:
        """The command that runs the cell again, empty where the record does not say."""
        return str(self.record.config.get("command") or "")

    @property
    def random_weights(self) -> bool:
        """Whether the weights were drawn, so that quality means nothing."""
        return bool(
            self.record.config.get("random_weights")
            or mapping(self.record.details.get("model")).get("random_weights")
        )

    @property
    def is_baseline(self) -> bool:
        """Whether the others of its group are compared with this row."""
        return bool(self.method) and self.method == self.record.config.get("baseline")

    @property
    def measured(self) -> bool:
        """Whether the cell came to its end, if not with every measure."""
        return self.record.status != "failed"

    def get(self, metric: str, protocol: str) -> Value | None:
        """Return a value the row may show, or None."""
        return self.values.get((metric, protocol))

    def all_of(self, metric: str) -> list[Value]:
        """Return the row's values of `metric` under every protocol."""
        return [value for (name, _), value in self.values.items() if name == metric]


@dataclass(frozen=True)
class Group:
    """The rows that may be compared: one model on one hardware."""

    model: str
    hardware: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Name of the group in headings."""
        return self.rows[0].group_title

    @cached_property
    def measured(self) -> tuple[Row, ...]:
        """The rows whose cells came to their end."""
        return tuple(row for row in self.rows if row.measured)

    @cached_property
    def baselines(self) -> tuple[Row, ...]:
        """The rows the others are compared with (one a suite)."""
        return tuple(row for row in self.measured if row.is_baseline)

    def baseline_value(self, row: Row, metric: str, protocol: str) -> Value | None:
        """Return the baseline's value that `row` is compared with: same metric, same protocol.

        A baseline of another version of the model is no baseline; one of the same suite goes first.
        """
        wanted = model_identity(row)
        for baseline in sorted(self.baselines, key=lambda b: b.suite != row.suite):
            value = baseline.get(metric, protocol)
            if value is not None and model_identity(baseline) in (wanted, ""):
                return value
        return None


def make_rows(records: Iterable[Record]) -> list[Row]:
    """Return one row a record in the order of the report: by group, the baseline first."""
    plain = [_row(record) for record in records]
    neighbours: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in plain:
        neighbours[row.model, row.hardware, row.label].append(row)
    labelled = [
        Row(row.record, label, row.values, row.execution)
        for rows in neighbours.values()
        for row, label in zip(rows, _distinct_labels(rows), strict=True)
    ]
    return sorted(labelled, key=_order)


def make_groups(rows: Sequence[Row]) -> list[Group]:
    """Return the groups of `rows`, in their order."""
    members: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        members[row.model, row.hardware].append(row)
    return [Group(model, hardware, tuple(rows)) for (model, hardware), rows in members.items()]


def main_protocol(rows: Iterable[Row], metric: str) -> str | None:
    """Return the protocol that most rows measured `metric` by; the plainest one among equals."""
    found = Counter(value.protocol for row in rows for value in row.all_of(metric))
    if not found:
        return None
    return min(found, key=lambda protocol: (-found[protocol], words.natural(protocol)))


def model_identity(row: Row) -> str:
    """Return the commit or digest of the row's model, empty where the record has none."""
    facts = mapping(row.record.details.get("model"))
    return str(facts.get("commit") or facts.get("sha256") or facts.get("digest") or "")


def kernels(row: Row) -> list[Mapping[str, Any]]:
    """Return the kernel provenance of `row`, the kernel of most weights first."""
    found = [mapping(entry) for entry in sequence(row.record.details.get("kernels"))]
    return sorted(found, key=lambda entry: -(number(entry.get("weights")) or 0))


def machine(row: Row) -> str:
    """Return the processor or card that the row ran on, empty where the record does not say."""
    environment = mapping(row.record.environment)
    return str(environment.get("gpu") or environment.get("cpu") or "")


def mapping(found: Any) -> Mapping[str, Any]:
    """Return `found` if it is a mapping, else an empty one: details are free-form."""
    return found if isinstance(found, Mapping) else {}


def sequence(found: Any) -> Sequence[Any]:
    """Return `found` if it is a list or tuple, else an empty one."""
    return found if isinstance(found, list | tuple) else ()


def kept_back(row: Row, of_family: str) -> str:
    """Return why `row` may not show a value of the family; empty where it may."""
    if row.execution == "simulated" and of_family in DEPLOYMENT:
        return "simulated"
    if row.random_weights and of_family in QUALITY:
        return "random weights"
    return ""


def _row(record: Record) -> Row:
    row = Row(record, "", {}, _execution(record))
    values: dict[tuple[str, str], Value] = {}
    for value in record.values:
        if not kept_back(row, family(value)):
            values.setdefault((value.metric, value.protocol), value)
    return Row(record, axes_label(row), values, row.execution)


def _execution(record: Record) -> str:
    states = [str(mapping(k).get("execution")) for k in sequence(record.details.get("kernels"))]
    states.append(str(record.details.get("execution", "")))
    known = [state for state in states if state in _STATES]
    return max(known, key=_STATES.index, default="")


def axes_label(row: Row) -> str:
    """Return method, bits and group size as one label."""
    parts = [row.method or row.record.cell]
    if row.bits is not None and row.group_size is not None:
        size = "per channel" if row.group_size == -1 else f"g{row.group_size}"
        parts += [f"{row.bits:.3g} bits", size]
    return " ".join(parts)


def _distinct_labels(rows: Sequence[Row]) -> list[str]:
    """Return labels that tell rows of equal axes apart, by the options in which they differ."""
    if len(rows) == 1:
        return [rows[0].label]
    options = [_options(row.record) for row in rows]
    keys = sorted({key for found in options for key in found})
    differing = [key for key in keys if len({found.get(key) for found in options}) > 1]
    labels = []
    for row, found in zip(rows, options, strict=True):
        shown = [f"{key.split('.')[-1]}={found.get(key, 'none')}" for key in differing[:2]]
        labels.append(f"{row.label} ({', '.join(shown)})" if shown else row.label)
    if len(set(labels)) == len(labels):
        return labels
    return [f"{label} [{row.record.cell}]" for label, row in zip(labels, rows, strict=True)]


def _options(record: Record) -> dict[str, str]:
    """Return the resolved options of the nodes that make a cell, flat: `method.symmetric`."""
    resolved = mapping(record.config.get("resolved"))
    options = {"suite": str(record.config.get("suite")), "data": str(record.config.get("data"))}
    for node in _RESOLVED_NODES:
        for key, value in mapping(resolved.get(node)).items():
            if key not in ("name", "_target_", "measures"):
                options[f"{node}.{key}"] = words.one_line(value)
    return options


def _order(row: Row) -> tuple[Any, ...]:
    bits = -(row.bits if row.bits is not None else _stored_bits(row))
    size = row.group_size if row.group_size is not None else 0
    # Per channel is the largest group.
    size = 1 << 40 if size == -1 else size
    return (
        row.model,
        row.hardware,
        not row.is_baseline,
        bits,
        words.natural(row.method),
        size,
        words.natural(row.label),
        row.record.cell,
    )


def _stored_bits(row: Row) -> float:
    """Return the bits a weight of a method that has no single width, 0 where they are unknown."""
    found = [*row.all_of("bits_per_weight"), *row.all_of("computed_bits_per_weight")]
    return found[0].value if found else 0.0


def number(found: Any) -> float | None:
    """Return `found` if it is a number, else None: details are free-form."""
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
