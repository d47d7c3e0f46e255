"""Records that are no rows: deployments that check themselves, and searches.

From `details["deploy"]` of records of job `deploy` and `details["search"]` of job `search`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.record import Record
from reports import words
from reports.blocks import Block, Field, Grid, Head, plain
from reports.gather import is_row
from reports.rows import Row, axes_label, mapping, sequence
from reports.rows import number as figure

VERDICTS = {True: "PASS", False: "FAIL", None: words.NOT_MEASURED}
NO_LIMIT = "no limit"
RUNG = "rung"
"""Job of the cells that a search scores on fewer windows."""


def job_of(record: Record) -> str:
    """Return the job that made `record`: `cell` made a row."""
    return str(record.config.get("job") or "cell")


def title_of(record: Record) -> str:
    """Return what a record of another job is called: the job and the row it is about."""
    job = job_of(record)
    return job if job == "search" else f"{job} {axes_label(Row(record, '', {}, ''))}"


def job_rows(records: Iterable[Record]) -> list[Row]:
    """Return records of other jobs as rows, for failures, commands and environments alone."""
    return [
        Row(record, title_of(record), {}, "")
        for record in sorted(records, key=lambda record: (job_of(record), record.cell))
        # The cells of a search's early rungs stand in the search.
        if not is_row(record) and (job_of(record) != RUNG or record.status != "ok")
    ]


def deploy_blocks(records: Iterable[Record]) -> list[Block]:
    """Return a block for each deployment."""
    return [
        _deployment(record, found)
        for record in records
        if (found := mapping(record.details.get("deploy")))
    ]


def _deployment(record: Record, found: Mapping[str, Any]) -> Block:
    config, profile = record.config, found.get("profile")
    checks = [mapping(check) for check in sequence(found.get("checks"))]
    states = [state_of(check) for check in checks]
    named = f"profile {profile}" if profile else "no profile"
    counts = ", ".join(
        f"{states.count(s)} {s}" for s in (*VERDICTS.values(), NO_LIMIT) if s in states
    )
    passed = "PASSED" if found.get("passed") is True else "DID NOT PASS"
    heads = (Head("Check"), Head("Result"), Head("Limit"), Head("Found"), Head("Why"))
    lines = tuple(
        (
            Field(str(check.get("name", "")).replace("_", " ")),
            Field(state),
            Field(shown(check.get("wanted"), check, "no limit")),
            Field(shown(check.get("found"), check, words.UNKNOWN)),
            Field(str(check.get("why") or "")),
        )
        for check, state in zip(checks, states, strict=True)
    )
    return Block(
        f"Deployment of {config.get('model', '')} on {config.get('hardware', '')}: {named}",
        (
            f"{passed}: {title_of(record).removeprefix('deploy ')} ({counts or 'no check'}).",
            *_where(found),
            f"Command: {config.get('command') or 'not stated in the record'}",
        ),
        (),
        (Grid("Checks", heads, lines),) if lines else (),
    )


def _where(found: Mapping[str, Any]) -> list[str]:
    """Say where it was checked, where the record says so, and for what it is meant."""
    checked, meant = found.get("checked_on"), found.get("meant_for")
    if not checked or not meant:
        return []
    return [f"Checked on {checked}; the profile is meant for {meant}."]


def state_of(check: Mapping[str, Any]) -> str:
    """Return PASS, FAIL, that it was not measured, or that there is no limit."""
    passed = check.get("passed")
    if not isinstance(passed, bool) and check.get("found") is not None:
        return NO_LIMIT
    return VERDICTS[passed if isinstance(passed, bool) else None]


def shown(value: Any, check: Mapping[str, Any], absent: str) -> str:
    """Return a limit or a figure in the check's unit."""
    if value is None:
        return absent
    unit, plain_value = str(check.get("unit") or ""), figure(value)
    if plain_value is None:
        return str(value)
    metrics = {"B": "x_bytes", "bytes": "x_bytes", "s": "x_seconds", "seconds": "x_seconds"}
    if unit in metrics:
        return words.figure(metrics[unit], plain_value)
    if unit == "share":
        name = str(check.get("name", ""))
        relative = "increase" in name or "above" in name
        return words.percent(plain_value) if relative else f"{100 * plain_value:.1f} %"
    return f"{words.spell(plain_value, words.significant)} {unit}".rstrip()


def search_blocks(records: Iterable[Record], labels: Mapping[str, str]) -> list[Block]:
    """Return a block for each search; `labels` are of the report's rows, by cell."""
    return [
        _search(record, found, labels)
        for record in records
        if (found := mapping(record.details.get("search")))
    ]


def _search(record: Record, found: Mapping[str, Any], labels: Mapping[str, str]) -> Block:
    rows = [mapping(row) for row in sequence(found.get("rows"))]
    names = {**labels, **{str(row.get("cell")): str(row.get("label")) for row in rows}}
    chosen = found.get("chosen")
    criterion = str(found.get("criterion") or "the criterion")
    if chosen:
        first = f"Chosen: {names.get(str(chosen), str(chosen))} ({criterion})."
    else:
        first = f"Nothing was chosen: no candidate met the criterion ({criterion})."
    rungs = [mapping(rung) for rung in sequence(found.get("rungs"))]
    grids = [_found(rows, chosen, figure(found.get("confidence")) or 0.95)] if rows else []
    if rungs:
        grids.append(_rungs(rungs, names))
    return Block(
        f"Search over {record.config.get('model', '')} on {record.config.get('hardware', '')}",
        (first, *_saved(mapping(found.get("evaluations")))),
        (),
        tuple(grids),
        "Each rung scores the candidates that are left on more windows; who is clearly worse than "
        "the criterion asks is dropped and scored no further.",
    )


def _saved(facts: Mapping[str, Any]) -> list[str]:
    made, whole, saved = (figure(facts.get(name)) for name in ("made", "exhaustive", "saved"))
    if made is None or whole is None or saved is None:
        return []
    unit = str(facts.get("unit") or "evaluations")
    part = f" ({100 * saved / whole:.0f} %)" if whole else ""
    if saved < 0:
        return [
            f"It scored {made:,.0f} {unit} where scoring every candidate in full takes "
            f"{whole:,.0f}: {-saved:,.0f} more, since little was dropped early."
        ]
    return [
        f"It scored {made:,.0f} {unit} where scoring every candidate in full takes {whole:,.0f}: "
        f"{saved:,.0f}{part} saved."
    ]


def _found(rows: Sequence[Mapping[str, Any]], chosen: Any, confidence: float) -> Grid:
    heads = (
        *(Head("Candidate"), Head("Size on disk", numeric=True), Head("Increase", numeric=True)),
        *(Head(f"{100 * confidence:g} % interval"), Head("Verdict")),
    )
    lines = []
    for row in sorted(rows, key=lambda row: figure(row.get("bytes")) or 0.0):
        increase, low, high = (figure(row.get(name)) for name in ("increase", "low", "high"))
        size = figure(row.get("bytes"))
        interval = words.UNKNOWN
        if low is not None and high is not None:
            interval = f"{words.percent(low)} to {words.percent(high)}"
        mark = ", chosen" if chosen and row.get("cell") == chosen else ""
        lines.append(
            (
                Field(f"{row.get('label') or row.get('cell', '')}{mark}"),
                Field(words.UNKNOWN)
                if size is None
                else Field(words.figure("x_bytes", size), size),
                Field(words.NOT_MEASURED)
                if increase is None
                else Field(words.spell(increase, words.percent), increase),
                Field(interval),
                Field(str(row.get("verdict") or words.UNKNOWN)),
            )
        )
    return Grid("Candidates, the smallest first", heads, tuple(lines))


def _rungs(rungs: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Grid:
    heads = (
        *(Head("Rung"), Head("Windows", numeric=True), Head("Scored", numeric=True)),
        Head("Dropped, and why"),
    )
    lines = []
    for place, rung in enumerate(rungs, 1):
        dropped = [mapping(entry) for entry in sequence(rung.get("dropped"))]
        said = "; ".join(
            f"{names.get(str(entry.get('cell')), str(entry.get('cell')))}: {entry.get('why', '')}"
            for entry in dropped
        )
        tried = len(sequence(rung.get("tried")))
        lines.append(
            (
                Field(str(place), float(place)),
                plain(figure(rung.get("windows"))),
                Field(str(tried), float(tried)),
                Field(said or "none"),
            )
        )
    return Grid("Rungs", heads, tuple(lines))
