"""What the documents advise for the case of a recommendation, and what their advice came to here.

The case is read from the group and the conditions: the device from the hardware, the size from the
model, what counts from `priority=` or from what is limited, and how tight the memory is from a
limit of memory or size over the model's parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports import words
from reports.documents.advice import Advice, Case, advice_for
from reports.recommend.choice import Selection
from reports.recommend.conditions import Conditions
from reports.rows import Group, Row, mapping, number

FOUR_BITS, EIGHT_BITS, SIXTEEN_BITS = 4.5, 8.5, 16.0
"""Bits a weight, scales included: a limit below the first is extreme, below the second low, from
the third on ample."""

CHOSEN, GOOD, SHORT, ABSENT = "the choice", "qualifies", "does not qualify", "not run here"
ORDER = (CHOSEN, GOOD, SHORT, ABSENT)
"""What advice came to, what agrees with the choice first."""


@dataclass(frozen=True)
class Piece:
    """Branches that advise the same, and what that came to here.

    Attributes:
        branches: of the documents' trees.
        state: `CHOSEN`, `GOOD`, `SHORT` or `ABSENT`.
        rows: labels of the rows that are what was advised.
    """

    branches: tuple[Advice, ...]
    state: str
    rows: tuple[str, ...]

    @property
    def text(self) -> str:
        """What is advised."""
        return self.branches[0].text

    @property
    def here(self) -> str:
        """What it came to, in words."""
        return (
            f"{self.state}: {', '.join(self.rows)}" if self.state in (GOOD, SHORT) else self.state
        )


def case_of(group: Group, conditions: Conditions) -> Case:
    """Return the case that `conditions` ask about on the model and hardware of `group`."""
    parameters = _parameters(group)
    return Case(
        _device(group),
        parameters,
        frozenset(conditions.priorities),
        _memory(conditions, parameters),
        (conditions.exact.get("purpose") or (None,))[0],
    )


def case_text(case: Case) -> str:
    """Return the case in words."""
    said = [f"device {case.device}"]
    if case.parameters is not None:
        said.append(f"{_count(case.parameters)} parameters")
    if case.priorities:
        said.append(f"what counts: {', '.join(sorted(case.priorities))}")
    said += [f"memory {case.memory}"] if case.memory else []
    said += [f"purpose {case.purpose}"] if case.purpose else []
    return ", ".join(said)


def counsel(selection: Selection, case: Case) -> list[Piece]:
    """Return the documents' advice for `case`, what agrees with the choice first."""
    together: dict[str, list[Advice]] = {}
    for one in advice_for(case):
        together.setdefault(one.text, []).append(one)
    found = [_piece(selection, branches) for branches in together.values()]
    return sorted(found, key=lambda piece: ORDER.index(piece.state))


def agreement(selection: Selection, pieces: Sequence[Piece]) -> str:
    """Return in one sentence whether the choice is what the documents advise."""
    if not pieces:
        return "The documents have no advice for this case."
    count = {state: sum(piece.state == state for piece in pieces) for state in ORDER}
    advised = words.count(len(pieces), "piece of advice", "pieces of advice")
    if selection.choice is None:
        said = advised
    elif len(pieces) == 1:
        said = f"1 piece of advice, which names {'' if count[CHOSEN] else 'not '}the choice"
    else:
        agree = f"{count[CHOSEN] or 'none'} {_verb(count[CHOSEN], 'agrees', 'agree')}"
        said = f"{advised}, of which {agree} with the choice"
    others = count[GOOD] + count[SHORT]
    if others:
        said += f"; {others} {_verb(others, 'names', 'name')} rows that were measured"
        said += " and not chosen" if selection.choice else ""
    if count[ABSENT]:
        said += f"; {count[ABSENT]} {_verb(count[ABSENT], 'was', 'were')} not run here"
    return f"{said}."


def _verb(count: int, one: str, more: str) -> str:
    return one if count == 1 else more


def _piece(selection: Selection, branches: Sequence[Advice]) -> Piece:
    named = [row for row in selection.group.rows if branches[0].names(row)]
    qualifying = {one.row.record.cell for one in selection.qualifying}
    chosen = selection.choice.row if selection.choice is not None else None
    if any(row is chosen for row in named):
        state = CHOSEN
    elif any(row.record.cell in qualifying for row in named):
        state = GOOD
        named = [row for row in named if row.record.cell in qualifying]
    else:
        state = SHORT if named else ABSENT
    return Piece(tuple(branches), state, tuple(row.label for row in named))


def _device(group: Group) -> str:
    environment = mapping(group.rows[0].record.environment)
    device = str(environment.get("device") or group.hardware)
    platform = str(environment.get("platform") or "")
    if "offload" in group.hardware:
        return "mixed"
    if device.startswith("cuda"):
        return "nvidia"
    return "apple" if platform.startswith(("macOS", "Darwin")) and "arm64" in platform else "cpu"


def _parameters(group: Group) -> float | None:
    found = [number(_model(row).get("parameters")) for row in group.rows]
    return next((value for value in found if value is not None), None)


def _model(row: Row) -> dict[str, object]:
    return dict(mapping(row.record.details.get("model")))


def _memory(conditions: Conditions, parameters: float | None) -> str | None:
    bits = []
    for limit in conditions.limits:
        if limit.upper and limit.name == "bits_per_weight":
            bits.append(limit.value)
        elif limit.upper and limit.name in ("memory", "size") and parameters:
            bits.append(8 * limit.value / parameters)
    if not bits:
        return None
    tightest = min(bits)
    if tightest < FOUR_BITS:
        return "extreme"
    if tightest < EIGHT_BITS:
        return "low"
    return "ample" if tightest >= SIXTEEN_BITS else None


def _count(parameters: float) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if parameters >= size:
            return f"{parameters / size:.3g} {name}"
    return f"{parameters:,.0f}"
