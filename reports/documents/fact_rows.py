"""Which rows answer a fact of the documents, and how far their figures are from the printed one.

A figure counts as reproduced only on the document's own model, by the same protocol, and for speed
and memory on the card that the document names. Figures of other models are shown and decide
nothing, unless the document names no model itself: then a claim holds here or it does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from harness.record import Value
from reports import words
from reports.documents.evidence import (
    DIFFERS,
    FAILS,
    HOLDS,
    OF_DEMONSTRATION,
    PARTLY,
    REPRODUCED,
    UNDECIDED,
    Evidence,
    Verdict,
    demonstration,
)
from reports.documents.facts import SIZE, SPEED, UNITS, Fact, Ours
from reports.protocols import screening
from reports.rows import Group, Row, family, machine, mapping

NOT_HERE = "not measured here"

COMPUTED = "computed from the architecture"

WIKITEXT = "wikitext2_gptq_2048"
"""The protocol of a perplexity of the documents that names none: GPTQ's, on the whole text."""

FREE_OF_MODEL = ("bits_per_weight", "computed_bits_per_weight")
"""Figures of a format rather than of a model."""

TIMED = ("speed", "serving", "latency", "energy", "quantize", "load")
"""Families of figures that a machine has, compared with the wider tolerance."""

APART = "two runs, not timed in turns"
"""What keeps a ratio of speeds from reproducing one; the metrics `..._speedup` are of one run."""

MOST_SHOWN = 4

_OTHER_CARD = {"ti", "super", "laptop", "mobile", "max", "ultra", "pro", "d"}
_VENDORS = {"nvidia", "geforce", "amd", "intel", "apple", "gpu"}


@dataclass(frozen=True)
class Figure:
    """What one row says of a fact, in the fact's unit.

    Attributes:
        protocol: its name, or that the figure was computed.
        doubt: why it cannot reproduce the printed figure, empty where it can.
        tolerance: relative difference up to which it would.
        points: the same in the fact's unit, for a share of a task's score.
    """

    row: Row
    value: float
    text: str
    protocol: str
    hardware: str
    doubt: str
    tolerance: float
    points: float

    @property
    def computed(self) -> bool:
        """Whether nothing was run for it."""
        return self.protocol == COMPUTED

    @property
    def where(self) -> str:
        """The row's label and its model."""
        return f"{self.row.label}, {self.row.model}"


@dataclass(frozen=True)
class Answer:
    """What the rows say of a fact; without a verdict they are shown and decide nothing."""

    verdict: Verdict | None
    figures: tuple[Figure, ...]


class Rows:
    """The report's measured rows with their groups, found by model and method."""

    def __init__(self, evidence: Evidence) -> None:
        self._found: dict[tuple[Any, Any], list[tuple[Group, Row]]] = {}
        self._saying: dict[str, list[tuple[Group, Row]]] = {}
        for group, row in evidence.rows:
            for key in product((row.model, None), (row.plain_method, None)):
                self._found.setdefault(key, []).append((group, row))

    def saying(self, where: Mapping[str, Any]) -> list[tuple[Group, Row]]:
        """Return the rows whose records say all of `where`; facts ask the same again and again."""
        asked = repr(sorted(where.items()))
        if asked not in self._saying:
            rest = {key: value for key, value in where.items() if key not in ("model", "method")}
            rows = self._found.get((where.get("model"), where.get("method")), ())
            self._saying[asked] = [(group, row) for group, row in rows if says(row, rest)]
        return self._saying[asked]


def answer(fact: Fact, rows: Rows) -> Answer:
    """Return what the report's rows say of `fact`."""
    ours = fact.ours
    if ours is None:
        return Answer(None, ())
    model = ours.where.get("model")
    others = {key: value for key, value in ours.where.items() if key != "model"}
    every = tuple(_figures(fact, ours, others, rows))
    if model is None and (fact.model is None or _compares(fact)):
        return Answer(_held(fact, every), every)
    own = tuple(figure for figure in every if model is not None and figure.row.model == model)
    deciding = tuple(figure for figure in own if not figure.doubt)
    if not deciding:
        return Answer(None, own or every)
    return Answer(_verdict(fact, deciding, (REPRODUCED, PARTLY, DIFFERS)), deciding)


def shown(value: float, unit: str | None) -> str:
    """Return a figure with its unit as documents print it: `3.9 GB`, `3.46x`, `5.68`."""
    text = f"{value:,.15g}"
    if unit in (None, "perplexity", "code", "weight"):
        return text
    return f"{text}x" if (unit or "").startswith("ratio") else f"{text} {unit}"


def same_card(named: str, machine_: str) -> bool:
    """Return whether a machine is the card that a document names: a 3090 Ti is no `RTX 3090`."""
    wanted = [word for word in _names(named) if word not in _VENDORS]
    found = [word for word in _names(machine_) if word not in _VENDORS]
    for start in range(len(found) - len(wanted) + 1):
        if wanted and found[start : start + len(wanted)] == wanted:
            after = found[start + len(wanted) : start + len(wanted) + 1]
            return not set(after) & _OTHER_CARD
    return False


def near(fact: Fact, value: float, tolerance: float, points: float = 0.0) -> bool:
    """Return whether `value`, in the fact's unit, is what the fact says, within `tolerance`.

    `points` are a margin in the fact's own unit.

    An increase counts as the same also where it rounds to the printed digits (one decimal at
    least), since one per cent of 0.7 % would ask for more.
    """
    if fact.value is None:
        return False
    if fact.relation in "<>":
        return value < fact.value if fact.relation == "<" else value > fact.value
    low, high = sorted((fact.value, fact.value if fact.to is None else fact.to))
    if fact.ours is not None and fact.ours.form == "increase":
        points = max(points, 0.5 * min(0.1, _last_digit(fact.value)))
    margins = [max(tolerance * abs(end), points) for end in (low, high)]
    slack = 1e-9 * max(abs(low), abs(high))
    return low - margins[0] - slack <= value <= high + margins[1] + slack


def _names(text: str) -> list[str]:
    plain = re.sub(r"\(.*?\)", " ", text.lower())
    return [w for w in re.findall(r"[a-z0-9]+", plain) if not re.fullmatch(r"\d+gb", w)]


def _last_digit(value: float) -> float:
    _, _, decimals = f"{value:.10g}".partition(".")
    return float(10 ** -len(decimals))


def _compares(fact: Fact) -> bool:
    """Whether a claim is that one row is better than another, by no stated figure."""
    return fact.value is None and fact.relation == ">"


def _figures(fact: Fact, ours: Ours, where: Mapping[str, Any], rows: Rows) -> Iterator[Figure]:
    """Return the figure of every row that says all of `where`."""
    for group, row in rows.saying(where):
        main = group.main_protocol(ours.metric)
        protocol = _protocol(fact, ours, main, row)
        value = row.get(ours.metric, protocol) if protocol else None
        found = None if value is None else _formed(ours, rows, row, value)
        if value is None or found is None:
            continue
        unit = fact.unit or _unit(ours, value)
        in_unit = found / UNITS.get(unit, ("", 1.0))[1]
        computed = value.protocol == "computed"
        yield Figure(
            row=row,
            value=in_unit,
            text=shown(float(f"{in_unit:.4g}"), unit),
            protocol=COMPUTED if computed else value.protocol,
            hardware="" if computed else ran_on(row),
            doubt=_doubt(fact, ours, row, value),
            tolerance=SPEED if family(value) in TIMED else SIZE,
            points=1.0 if family(value) == "tasks" and ours.form == "share" else 0.0,
        )


def says(row: Row, where: Mapping[str, Any]) -> bool:
    """Return whether the row's record says all of `where`, in its axes or the method's options."""
    config = row.record.config
    options = mapping(mapping(config.get("resolved")).get("method"))
    return all((config[k] if k in config else options.get(k)) == v for k, v in where.items())


def ran_on(row: Row) -> str:
    """Return the processor or the card that the row's figures are of."""
    environment = mapping(row.record.environment)
    if environment.get("device") == "cpu":
        return str(environment.get("cpu") or "not stated")
    return machine(row) or "not stated"


def _unit(ours: Ours, value: Value) -> str:
    """Return the unit in which the rows' own figure is told where the document prints none."""
    own = {"value": value.unit, "ratio": "ratio", "increase": "%", "share": "%"}
    return own[ours.form]


def _protocol(fact: Fact, ours: Ours, main: str | None, row: Row) -> str | None:
    """Return the protocol of the row's figure: of those that would do the plainest one.

    `main` is that of most rows of its group.
    """
    begins = ours.protocol
    if begins is None and ours.metric == "perplexity" and fact.model is not None:
        own = [value.protocol for value in row.all_of(ours.metric)]
        begins = WIKITEXT if any(name.startswith(WIKITEXT) for name in own) else None
    if begins is None and main is not None:
        return main
    # What no group measures by itself is a task's score; a task's perplexity is not a text's.
    if begins is None and ours.metric == "perplexity":
        return None
    found = [p for m, p in row.values if m == ours.metric and p.startswith(begins or "")]
    return min(found, key=lambda p: (bool(screening(p)), words.natural(p)), default=None)


def _formed(ours: Ours, rows: Rows, row: Row, value: Value) -> float | None:
    """Return the row's figure in the form of `ours`, None without the other row.

    The other row is of the same model and, where anything ran, of the same machine.
    """
    if ours.form == "value":
        return value.value
    wanted = {**ours.other, "model": row.model}
    computed = value.protocol == "computed"
    others = [
        found
        for _, other in rows.saying(wanted)
        if (computed or (other.hardware, ran_on(other)) == (row.hardware, ran_on(row)))
        and (found := other.get(ours.metric, value.protocol)) is not None
    ]
    if not others or not value.value > 0 or not others[0].value > 0:
        return None
    grown = value.value / others[0].value
    if ours.form == "ratio":
        return grown if value.higher_is_better else 1 / grown
    return grown - 1 if ours.form == "increase" else grown


def _doubt(fact: Fact, ours: Ours, row: Row, value: Value) -> str:
    """Return why the row's figure cannot reproduce the fact's; empty where it can."""
    kind = family(value)
    if kind == "perplexity" and not value.protocol.startswith(ours.protocol or WIKITEXT):
        return f"its protocol is {value.protocol}, not {ours.protocol or WIKITEXT}"
    if found := screening(value.protocol):
        return found
    if _apart(ours, value):
        return APART
    if kind not in (*TIMED, "memory"):
        of_a_run = fact.hardware is not None and "memory" in (fact.metric or "")
        return "the weights alone, not the memory of a run" if of_a_run else ""
    if fact.hardware is None:
        return "the document names no card"
    any_processor = fact.hardware == "CPU" and row.record.environment.get("device") == "cpu"
    if not any_processor and not same_card(fact.hardware, ran_on(row)):
        return f"it ran on {ran_on(row)}, not on {fact.hardware}"
    return ""


def _apart(ours: Ours, value: Value) -> bool:
    """Whether a ratio is of the speeds of two runs, which nobody timed in turns."""
    return ours.form != "value" and family(value) in ("speed", "latency", "serving", "energy")


def _held(fact: Fact, figures: Sequence[Figure]) -> Verdict | None:
    """Return the verdict on a claim without a model, by rows of whatever model there is."""
    if not figures or fact.ours is None:
        return None
    of_model = not fact.ours.metric.endswith("speedup") and fact.ours.metric not in FREE_OF_MODEL
    if fact.ours.form == "value" and fact.relation in "=~" and of_model:
        return None
    deciding = [figure for figure in figures if not _beside_the_point(figure)]
    if not deciding:
        why = "; ".join(dict.fromkeys(_beside_the_point(figure) for figure in figures))
        return Verdict(UNDECIDED, f"Here {told(fact, figures)}. {why}")
    return _verdict(fact, deciding, (HOLDS, PARTLY, FAILS))


def _beside_the_point(figure: Figure) -> str:
    """Return why a figure cannot decide on a claim about models in general, as a sentence."""
    if not figure.computed and demonstration(figure.row.record):
        return OF_DEMONSTRATION
    if figure.doubt == APART:
        return "Speeds of two runs that were not timed in turns decide nothing."
    if figure.points and screening(figure.protocol):
        return "A screening shows that a row is broken, not how much of its accuracy it keeps."
    return ""


def _verdict(fact: Fact, figures: Sequence[Figure], said: tuple[str, str, str]) -> Verdict | None:
    if fact.value is None:
        return _better(fact, figures)
    same = [near(fact, f.value, f.tolerance, f.points) for f in figures]
    verdict = said[0] if all(same) else said[1] if any(same) else said[2]
    return Verdict(verdict, f"Here {told(fact, figures)}.")


def _better(fact: Fact, figures: Sequence[Figure]) -> Verdict | None:
    """Return whether one row is better than another: a ratio above 1.

    What was measured and is nearer to 1 than the tolerance decides nothing.
    """
    if not _compares(fact) or fact.ours is None or fact.ours.form != "ratio":
        return None
    margins = [0.0 if figure.computed else figure.tolerance for figure in figures]
    better = [f.value > 1 + m for f, m in zip(figures, margins, strict=True)]
    worse = [f.value <= 1 - m for f, m in zip(figures, margins, strict=True)]
    verdict = UNDECIDED
    if any(better):
        verdict = HOLDS if all(better) else PARTLY
    elif all(worse):
        verdict = FAILS
    return Verdict(verdict, f"How many times better here: {told(fact, figures)}.")


def told(fact: Fact, figures: Sequence[Figure]) -> str:
    """Return the figures with their rows, and how far those of the same model are off."""
    own = fact.model is None or fact.ours is None or "model" not in fact.ours.where
    parts = []
    for figure in figures[:MOST_SHOWN]:
        said = f"{figure.where}: {figure.text}"
        compared = own or (fact.ours is not None and figure.row.model == fact.ours.where["model"])
        if fact.value and fact.to is None and fact.relation in "=~" and compared:
            said += f" ({words.percent(figure.value / fact.value - 1)})"
        if fact.value is not None and fact.to is not None and compared:
            said += _side(fact.value, fact.to, figure.value)
        if found := screening(figure.protocol) or (APART if figure.doubt == APART else ""):
            said += f" ({found})"
        parts.append(said)
    if len(figures) > MOST_SHOWN:
        parts.append(f"and {words.count(len(figures) - MOST_SHOWN, 'row')} more")
    return "; ".join(parts)


def _side(low: float, high: float, value: float) -> str:
    if low <= value <= high:
        return ""
    return " (above the range)" if value > high else " (below the range)"
