"""A recommendation as text: tables on a terminal, plain in a pipe, and as JSON."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table

from reports import protocols, words
from reports.documents.advice import Case, places
from reports.recommend.choice import Candidate, Selection
from reports.recommend.conditions import Limit
from reports.recommend.counsel import ABSENT, Piece, agreement, case_text
from reports.recommend.readings import speed_note
from reports.rows import Row

MOST_MISSES = 5
MOSTLY_PROCESS = 0.2
"""Share of the peak memory below which the model itself is the smaller part of it."""


@dataclass(frozen=True)
class Answer:
    """What is recommended for one model on one hardware, and what the documents say of the case."""

    selection: Selection
    case: Case
    pieces: tuple[Piece, ...]


def answer_text(answer: Answer, width: int | None, *, colour: bool) -> str:
    """Return the answer as text, `width` columns wide (None: the terminal's)."""
    console = Console(
        file=io.StringIO(),
        width=width,
        markup=False,
        highlight=False,
        emoji=False,
        force_terminal=colour,
    )
    selection = answer.selection
    with console.capture() as text:
        console.print(_title(selection), style="bold")
        _print_choice(console, selection)
        for title, table in _tables(answer):
            console.print(f"\n{title}", style="bold")
            console.print(table)
        for sentence in _remarks(selection):
            console.print(sentence)
        console.print(f"\nThe documents, for {case_text(answer.case)}", style="bold")
        console.print(agreement(selection, answer.pieces))
        if answer.pieces:
            console.print(_counsel(answer.pieces))
            if any(piece.state == ABSENT for piece in answer.pieces):
                console.print(_how_to_run(answer.pieces))
    lines = (line.rstrip() for line in text.get().splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def answer_json(answer: Answer) -> dict[str, Any]:
    """Return the answer as plain data; figures are in bytes, seconds, shares and tokens/s."""
    selection = answer.selection
    choice = selection.choice
    return {
        "model": selection.group.model,
        "hardware": selection.group.hardware,
        "choice": None
        if choice is None
        else {
            "cell": choice.row.record.cell,
            "label": choice.row.label,
            "command": choice.row.command,
            "why": list(choice.why),
            "others": {what: row.record.cell for what, row in choice.others},
        },
        "qualifying": [_entry(one, selection) for one in selection.qualifying],
        "misses": [_entry(one, selection) for one in selection.misses],
        "not_measured": [_entry(one, selection) for one in selection.unmeasured],
        "failed": [row.record.cell for row in selection.failed],
        "left_out": [row.record.cell for row in selection.left_out],
        "case": {**vars(answer.case), "priorities": sorted(answer.case.priorities)},
        "advice": [
            {
                "advised": piece.text,
                "state": piece.state,
                "rows": list(piece.rows),
                "branches": [one.name for one in piece.branches],
                "by": places(piece.branches),
                "command": piece.branches[0].command,
            }
            for piece in answer.pieces
        ],
    }


def _entry(one: Candidate, selection: Selection) -> dict[str, Any]:
    return {
        "cell": one.row.record.cell,
        "label": one.row.label,
        "on_front": one.row.record.cell in selection.front,
        "figures": {axis.metric: _finite(axis.value(one.row)) for axis in selection.axes.known},
        "limits": {
            check.limit.key: {
                "value": _finite(check.value),
                "text": check.text,
                "kept": None if check.value is None else not check.broken,
                "broken": check.broken,
                "note": check.note,
            }
            for check in one.checks
        },
    }


def _finite(value: float | None) -> float | None:
    """Return `value` where JSON has such a number; its text stands beside it."""
    return None if value is None or not math.isfinite(value) else value


def _title(selection: Selection) -> str:
    limits = "; ".join(map(_limit, selection.conditions.limits)) or "no limits"
    rows = words.count(len(selection.group.rows), "row")
    return f"{_clean(selection.group.title)}, {rows}; {limits}"


def _limit(limit: Limit) -> str:
    name = limit.name.replace("_", " ")
    return f"{name} {'at most' if limit.upper else 'at least'} {limit.text}"


def _print_choice(console: Console, selection: Selection) -> None:
    choice = selection.choice
    if choice is None and selection.qualifying:
        console.print("No choice.", style="bold")
        console.print(
            "  No quality was measured of the rows that qualify, so nothing says which to take; "
            "priority=size or priority=speed chooses without it."
        )
        return
    if choice is None:
        console.print("Nothing qualifies.", style="bold")
        if selection.misses:
            nearest = selection.misses[0]
            console.print(f"Nearest: {_clean(nearest.row.label)}: {_broken(nearest)}.")
        return
    console.print(f"Choice: {_clean(choice.row.label)}", style="bold")
    lines = list(choice.why)
    for what, row in choice.others:
        figures = ", ".join(axis.text(row) for axis in selection.axes.known)
        lines.append(f"The front's {what}: {row.label} ({figures}).")
    for line in lines:
        console.print(Padding(_clean(line), (0, 0, 0, 2)))
    if choice.row.command:
        # On one line, so that it can be copied.
        console.print(f"  {_clean(choice.row.command)}", soft_wrap=True)


def _tables(answer: Answer) -> list[tuple[str, Table]]:
    selection = answer.selection
    made: list[tuple[str, Table]] = []
    if selection.qualifying:
        count = words.count(len(selection.qualifying), "row qualifies", "rows qualify")
        made.append((f"{count}, {len(selection.front)} on the front", _qualifying(selection)))
    if selection.misses:
        shown = selection.misses[:MOST_MISSES]
        more = len(selection.misses) - len(shown)
        title = "Nearest misses" + (f" (and {more} further off: --json)" if more else "")
        table = _table("row", Column("breaks", overflow="fold"))
        for one in shown:
            table.add_row(_clean(one.row.label), _broken(one))
        made.append((title, table))
    if selection.unmeasured or selection.failed:
        table = _table("row", Column("what is missing", overflow="fold"))
        for one in selection.unmeasured:
            said = [f"{check.limit.key}: {_clean(check.text)}" for check in one.unmeasured]
            said += [f"and breaks {_broken(one)}"] if one.broken else []
            table.add_row(_clean(one.row.label), "; ".join(said))
        for row in selection.failed:
            table.add_row(_clean(row.label), f"failed: {_failure(row)}")
        made.append(("Not measured, so not qualifying", table))
    return made


def _qualifying(selection: Selection) -> Table:
    axes = selection.axes.known
    limits = [
        limit
        for limit in selection.conditions.limits
        if limit.name == "perplexity_increase" or not _shown(limit, selection)
    ]
    table = _table(
        "row",
        "",
        *(Column(axis.title, justify="right") for axis in axes),
        *(Column(limit.name.replace("_", " "), justify="right") for limit in limits),
        Column("to know", overflow="fold"),
    )
    for one in selection.qualifying:
        checks = {check.limit: check for check in one.checks}
        table.add_row(
            _clean(one.row.label),
            _mark(one.row, selection),
            *(axis.text(one.row) for axis in axes),
            *(checks[limit].text for limit in limits),
            "; ".join(_notes(one, selection)),
        )
    return table


def _mark(row: Row, selection: Selection) -> str:
    if selection.choice is not None and row is selection.choice.row:
        return "choice"
    return "front" if row.record.cell in selection.front else ""


def _shown(limit: Limit, selection: Selection) -> bool:
    """Whether the limited figure is an axis, and so has its column."""
    metrics = {axis.metric for axis in selection.axes.known}
    return bool(metrics & set(limit.figure.metrics))


def _notes(one: Candidate, selection: Selection) -> list[str]:
    """Return what a reader must know of a row's figures, each once."""
    noted = [check for check in one.checks if check.note]
    named = len({check.note for check in noted}) > 1
    said = [f"{check.limit.name}: {check.note}" if named else check.note for check in noted]
    speed = selection.axes.speed
    if speed is not None and (note := speed_note(one.row, speed.protocol)):
        said += [] if any(check.note == note for check in noted) else [note]
    if one.row.execution not in ("packed", ""):
        said.append(one.row.execution)
    return list(dict.fromkeys(filter(None, said)))


def _broken(one: Candidate) -> str:
    said = []
    for check in one.broken:
        note = f" ({check.note})" if check.note else ""
        said.append(f"{check.limit.key}: {check.text}, {check.broken}{note}")
    return "; ".join(said)


def _failure(row: Row) -> str:
    return _clean(row.errors[0].message) if row.errors else "the record says no more"


def _remarks(selection: Selection) -> list[str]:
    said = []
    quality = selection.axes.quality
    if quality is not None and (screening := protocols.screening(quality.protocol)):
        said.append(
            f"{quality.title} is of {quality.protocol}, a {screening}: it can show that a row is "
            "broken, not which of two good rows is better."
        )
    if selection.choice is not None and (share := _own_share(selection.choice.row, selection)):
        said.append(
            f"The model is {100 * share:.0f} % of the choice's peak memory, the rest is the "
            "process itself: of models this small, size says more than memory (max_size)."
        )
    if selection.left_out:
        names = [k for k in ("method", "execution") if k in selection.conditions.exact]
        said.append(
            f"{words.count(len(selection.left_out), 'row')} left out by {words.listed(names)}."
        )
    for what, axis in (
        ("quality", selection.axes.quality),
        ("memory or size", selection.axes.cost),
        ("decoding speed", selection.axes.speed),
    ):
        if axis is None and selection.qualifying:
            said.append(f"Of these rows no {what} was measured: the front has no such axis.")
    return said


def _own_share(row: Row, selection: Selection) -> float | None:
    """Return the model's share of the row's peak memory where it is small, else None."""
    cost, sizes = selection.axes.cost, row.all_of("artefact_bytes")
    if cost is None or cost.metric != "peak_memory_bytes" or not sizes:
        return None
    memory = cost.value(row)
    share = sizes[0].value / memory if memory else 1.0
    return share if share < MOSTLY_PROCESS else None


def _how_to_run(pieces: Sequence[Piece]) -> str:
    absent = next(piece for piece in pieces if piece.state == ABSENT)
    return (
        "What was not run is run by its words, with what the other rows were run with: "
        f"{absent.branches[0].command.split(';')[0]}"
    )


def _counsel(pieces: Sequence[Piece]) -> Table:
    table = _table(
        Column("advised", overflow="fold"),
        Column("by", overflow="fold"),
        Column("here", overflow="fold"),
    )
    for piece in pieces:
        table.add_row(piece.text, places(piece.branches), _clean(piece.here))
    return table


def _table(*columns: str | Column) -> Table:
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _clean(text: object) -> str:
    return words.one_line(text)
