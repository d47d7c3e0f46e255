"""One row of the report: its axes, the values it may show, its baseline.

A row is one record, or the records of several repetitions (`reports.repetitions`). Two rules of
the project are applied here, once, for every table and figure:

- a `simulated` row (rounded values stored as floats) carries no speed, memory or size figure;
- a row of random weights carries no quality figure.

What a rule keeps back stays in the record; `kept_back` says why it is not shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from harness.record import Failure, Record, Value
from reports import words

FAMILY_OF_METRIC = {
    **dict.fromkeys(
        ("artefact_bytes", "bits_per_weight", "quantized_bytes", "head_bytes", "embedding_bytes"),
        "size",
    ),
    **dict.fromkeys(("other_bytes", "computed_bytes", "computed_bits_per_weight"), "size"),
    "read_bytes_per_token": "size",
    **dict.fromkeys(("quantize_seconds", "quantize_peak_bytes"), "quantize"),
    **dict.fromkeys(("load_seconds", "first_logits_seconds"), "load"),
    **dict.fromkeys(("peak_memory_bytes", "kv_cache_bytes"), "memory"),
    "perplexity": "perplexity",
}
"""Families of metrics that the harness measures itself; else a value's measure is its family."""

DEPLOYMENT = frozenset({"size", "memory", "speed", "energy", "load", "serving", "latency"})
"""What a simulated row cannot know: nothing was stored or run in the method's own format."""

QUALITY = frozenset({"perplexity", "divergence", "generation", "tasks", "embedding", "masked"})
"""What random weights cannot know."""

STATES = ("packed", "dequantized", "simulated")
"""How a matrix may be run, the most honest first."""


def family(value: Value) -> str:
    """Return the kind of question that `value` answers: `speed`, `size`, `perplexity`, ..."""
    if value.measure == "tasks":
        return "tasks"
    return FAMILY_OF_METRIC.get(value.metric, value.measure)


@dataclass(frozen=True)
class Spread:
    """One figure over repetitions.

    Attributes:
        count: repetitions that have the figure.
        deviation: standard deviation over them.
        interval: 95 % t interval of their mean, None where there is none.
    """

    count: int
    deviation: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """One record, or several repetitions of one, as the report shows it.

    Attributes:
        record: what the cell left behind; of repetitions, the first.
        label: method, bits, group size and whatever else tells the row from its neighbours.
        values: the values the row may show, by (metric, protocol); of repetitions, their means.
        execution: the worst state of its matrices, empty where nothing was loaded.
        repetitions: the rows this one was merged from, empty where it is one record.
        spreads: of repetitions, how each figure varied over them.
        repeated: what varied, as `3 seeds`, empty where nothing did.
    """

    record: Record
    label: str
    values: Mapping[tuple[str, str], Value]
    execution: str
    repetitions: tuple[Row, ...] = ()
    spreads: Mapping[tuple[str, str], Spread] = field(default_factory=dict)
    repeated: str = ""

    @property
    def cells(self) -> tuple[Row, ...]:
        """The rows of single records that this one stands for: its repetitions, or itself."""
        return self.repetitions or (self,)

    @property
    def status(self) -> str:
        """`ok`, `partial` or `failed`: the worst of its repetitions."""
        found = {cell.record.status for cell in self.cells}
        return next((status for status in ("failed", "partial") if status in found), "ok")

    @property
    def errors(self) -> tuple[Failure, ...]:
        """What went wrong in any of its repetitions."""
        return tuple(error for cell in self.cells for error in cell.record.errors)

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.record.config.get("model", ""))

    @property
    def method(self) -> str:
        """Name of the method; `rtn A8` where an option has it round activations to 8 bits."""
        bits = self.activation_bits
        return self.plain_method if bits is None else f"{self.plain_method} A{bits}"

    @property
    def plain_method(self) -> str:
        """Name of the method as `method=` chooses it."""
        return str(self.record.config.get("method", ""))

    @property
    def activation_bits(self) -> int | None:
        """Bits of activations where the method has that as an option, None: as the hardware has."""
        return self._activation_bits("method")

    def _activation_bits(self, node: str) -> int | None:
        options = mapping(mapping(self.record.config.get("resolved")).get(node))
        bits = number(options.get("activation_bits"))
        return None if bits is None else int(bits)

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

    @cached_property
    def is_baseline(self) -> bool:
        """Whether the others of its group are compared with this row."""
        if not self.plain_method or self.plain_method != self.record.config.get("baseline"):
            return False
        return self.activation_bits == self._activation_bits("baseline")

    @property
    def measured(self) -> bool:
        """Whether the cell came to its end, if not with every measure."""
        return self.status != "failed"

    def get(self, metric: str, protocol: str) -> Value | None:
        """Return a value the row may show, or None."""
        return self.values.get((metric, protocol))

    def all_of(self, metric: str) -> list[Value]:
        """Return the row's values of `metric` under every protocol, tasks' scores left out.

        A task may have a score of the same name: lambada's perplexity is not that of a text.
        """
        return list(self._by_metric.get(metric, ()))

    @cached_property
    def model_identity(self) -> str:
        """The commit or digest of its model, empty where the record has none."""
        facts = mapping(self.record.details.get("model"))
        return str(facts.get("commit") or facts.get("sha256") or facts.get("digest") or "")

    @cached_property
    def _by_metric(self) -> Mapping[str, list[Value]]:
        found: dict[str, list[Value]] = {}
        for (name, _), value in self.values.items():
            if family(value) != "tasks":
                found.setdefault(name, []).append(value)
        return found


@dataclass(frozen=True, eq=False)
class Group:
    """The rows that may be compared: one model on one hardware.

    Two groups are equal only where they are the same object, so that what is computed of one can
    be kept.
    """

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

    def main_protocol(self, metric: str) -> str | None:
        """Return what `main_protocol` says of the rows, which are asked once."""
        if metric not in self._main_protocols:
            self._main_protocols[metric] = main_protocol(self.rows, metric)
        return self._main_protocols[metric]

    @cached_property
    def _main_protocols(self) -> dict[str, str | None]:
        return {}

    def baseline_of(self, row: Row, metric: str, protocol: str) -> Row | None:
        """Return the baseline that `row` is compared with in `metric` under `protocol`.

        A baseline of another version of the model is no baseline; one of the same suite goes first.
        """
        found = [
            baseline
            for baseline in self.baselines
            if (metric, protocol) in baseline.values
            and baseline.model_identity in (row.model_identity, "")
        ]
        return min(found, key=lambda baseline: baseline.suite != row.suite, default=None)

    def baseline_value(self, row: Row, metric: str, protocol: str) -> Value | None:
        """Return the baseline's value that `row` is compared with: same metric, same protocol."""
        baseline = self.baseline_of(row, metric, protocol)
        return None if baseline is None else baseline.get(metric, protocol)


def main_protocol(rows: Iterable[Row], metric: str) -> str | None:
    """Return the protocol that most rows measured `metric` by; the plainest one among equals.

    Scores of tasks are not looked at: a task is a protocol of its own.
    """
    found = Counter(value.protocol for row in rows for value in row.all_of(metric))
    if not found:
        return None
    return min(found, key=lambda protocol: (-found[protocol], words.natural(protocol)))


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


def axes_label(row: Row) -> str:
    """Return method, bits and group size as one label: `rtn 4 bits g128`, `rtn W4A8 g128`.

    A method that hands its model on names the other one, too: `prune_quant 30 % -> rtn 8 bits
    g128`. Of an allocation, bits are the average: `mixed 4.25 bits on average`.
    """
    node = mapping(mapping(row.record.config.get("resolved")).get("method"))
    if mapping(node.get("then")):
        pruning = mapping(mapping(row.record.details.get("method")).get("pruning"))
        return node_label({**node, "amount": pruning.get("amount", node.get("amount"))})
    allocated = mapping(mapping(row.record.details.get("method")).get("allocation"))
    if allocated and row.bits is not None:
        return f"{row.plain_method} {row.bits:.3g} bits on average"
    if row.bits is None or row.group_size is None:
        return row.method or row.record.cell
    name = row.plain_method or row.record.cell
    return _label(name, row.bits, row.group_size, row.activation_bits)


def node_label(node: Mapping[str, Any]) -> str:
    """Return what a method is called by its node of the configuration, with the one in it."""
    then = mapping(node.get("then"))
    amount, name = number(node.get("amount")), str(node.get("name", ""))
    if not then:
        bits, size = number(node.get("bits")), number(node.get("group_size"))
        if bits is None or size is None:
            return name
        activations = number(node.get("activation_bits"))
        return _label(name, bits, int(size), None if activations is None else int(activations))
    shown = name if amount is None else f"{name} {100 * amount:g} %"
    return f"{shown} -> {node_label(then)}"


def _label(name: str, bits: float, group_size: int, activation_bits: int | None) -> str:
    width = f"{bits:.3g} bits"
    if activation_bits is not None:
        width = f"W{bits:.3g}A{activation_bits}"
    return f"{name} {width} {'per channel' if group_size == -1 else f'g{group_size}'}"


def number(found: Any) -> float | None:
    """Return `found` if it is a number, else None: details are free-form."""
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
