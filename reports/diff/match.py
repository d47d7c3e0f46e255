"""Which cells of two sets of records are the same question, asked twice.

Cells are matched by what the user asked for and never by their ids, which other versions of code
and libraries change: first where every option is equal, then by model, method with its options,
bits, group size, measures of the suite, data, name of the hardware and seed, then without the
suite, whose figures then meet only under equal protocols, and last without the widths that a cell
only knows when it is done. From the second step on, options that one set does not know at all
(those of another version) are left out. Places (paths, commits) are not what was asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.record import Record
from reports import words
from reports.gather import make_rows
from reports.rows import Row, mapping

NODES = ("model", "method", "baseline", "hardware", "suite", "data")
PLAIN = ("seed", "reference_dtype", "on_indivisible")
AXES = ("model", "method", "hardware")
WIDTHS = ("bits", "group_size")
"""As the quantized model has them, which a cell that failed does not know."""

PLACES = frozenset(
    {
        *("model.path", "model.revision", "model.reference", "model.tokenizer"),
        *("data.path", "data.revision", "data.tasks"),
        # A name alone: where a cell was measured stands in its environment.
        "hardware.machine",
    }
)
LIMITS = frozenset({"hardware.memory_limit_bytes", "hardware.time_limit_seconds"})
"""They decide whether there is a figure, not which."""

HANDED_OUT = "hardware.launch."
"""How a launcher was told to run a cell, which decides when there is a figure."""

Options = Mapping[str, str]


@dataclass(frozen=True)
class Pair:
    """One cell of A and the cell of B that was asked the same."""

    name: str
    first: Row
    second: Row


@dataclass(frozen=True)
class Ambiguous:
    """Cells that were asked the same, more than one in at least one set."""

    first: tuple[Row, ...]
    second: tuple[Row, ...]


@dataclass(frozen=True)
class Matching:
    """The cells of two sets: matched, in one set alone, or of several in question."""

    pairs: tuple[Pair, ...]
    only_first: tuple[Row, ...]
    only_second: tuple[Row, ...]
    ambiguous: tuple[Ambiguous, ...]


def match(first: Sequence[Record], second: Sequence[Record]) -> Matching:
    """Return which rows of two sets belong together; records of other jobs are no rows."""
    left, right = make_rows(first, "none"), make_rows(second, "none")
    known = _known(left) & _known(right)
    order = {row.record.cell: place for place, row in enumerate(left)}
    steps: tuple[Callable[[Row], Options], ...] = (
        lambda row: settings(row.record),
        lambda row: _asked(row, known),
        lambda row: _without(_asked(row, known), "suite."),
        lambda row: _without(_asked(row, known), "suite.", *WIDTHS),
    )
    found: list[tuple[Row, Row]] = []
    ambiguous: list[Ambiguous] = []
    for options_of in steps:
        taken: set[int] = set()
        for ones, others in _shared(left, right, options_of):
            if len(ones) == len(others) == 1:
                found.append((ones[0], others[0]))
            else:
                ambiguous.append(Ambiguous(tuple(ones), tuple(others)))
            # By identity: to compare rows is to compare all their samples.
            taken |= {id(row) for row in (*ones, *others)}
        left = [row for row in left if id(row) not in taken]
        right = [row for row in right if id(row) not in taken]
    found.sort(key=lambda pair: order[pair[0].record.cell])
    groups = {row.group_title for row, _ in found}
    return Matching(
        tuple(
            Pair(row.label if len(groups) == 1 else f"{row.label} ({row.group_title})", row, other)
            for row, other in found
        ),
        tuple(left),
        tuple(right),
        tuple(ambiguous),
    )


def settings(record: Record) -> dict[str, str]:
    """Return all options of a record that may change a figure, flat: `method.symmetric`."""
    config = record.config
    resolved = mapping(config.get("resolved"))
    found = {name: str(config.get(name)) for name in AXES}
    found["data"] = str(config.get("data"))
    for name in NODES:
        found |= _flat(resolved.get(name), name)
    found |= {name: str(resolved[name]) for name in PLAIN if name in resolved}
    found |= {name: str(config.get(name)) for name in WIDTHS}
    return {
        key: value
        for key, value in found.items()
        if key not in PLACES | LIMITS and not key.startswith(HANDED_OUT)
    }


def _asked(row: Row, known: frozenset[str]) -> Options:
    """Return what the user asked for, of options that both sets know."""
    axes = (*AXES, "data", "seed", *WIDTHS)
    return {
        key: value
        for key, value in settings(row.record).items()
        if key in axes or (key.startswith(("method.", "data.", "suite.measures.")) and key in known)
    }


def _known(rows: Iterable[Row]) -> frozenset[str]:
    return frozenset(key for row in rows for key in settings(row.record))


def _without(options: Options, *prefixes: str) -> Options:
    return {key: value for key, value in options.items() if not key.startswith(prefixes)}


def _shared(
    left: Sequence[Row], right: Sequence[Row], options_of: Callable[[Row], Options]
) -> list[tuple[list[Row], list[Row]]]:
    """Return the rows of equal options that are in both sets."""
    sets: dict[frozenset[tuple[str, str]], tuple[list[Row], list[Row]]]
    sets = defaultdict(lambda: ([], []))
    for place, rows in enumerate((left, right)):
        for row in rows:
            sets[frozenset(options_of(row).items())][place].append(row)
    return [(ones, others) for ones, others in sets.values() if ones and others]


def _flat(found: Any, above: str) -> dict[str, str]:
    """Return the options in `found`, those of nodes inside it included; classes are left out."""
    if not isinstance(found, Mapping):
        text = "null" if found is None else words.one_line(found)
        return {above: text} if "." in above else {}
    options: dict[str, str] = {}
    for key, value in found.items():
        if key != "_target_":
            options |= _flat(value, f"{above}.{key}")
    return options
