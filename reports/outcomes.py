"""What a job that is no row found, in lines for the terminal: a deployment's checks, a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.record import Record
from reports import words
from reports.jobs import shown, state_of


def succeeded(record: Record) -> bool:
    """Whether a job reached what it was for; true for one that only measures."""
    deploy, search = record.details.get("deploy"), record.details.get("search")
    if deploy is not None:
        return bool(deploy["passed"])
    return search is None or search["chosen"] is not None


def outcome_text(record: Record) -> str:
    """Return the outcome as lines; empty for a record that has none."""
    if record.details.get("deploy") is not None:
        return _deploy_text(record.details["deploy"])
    if record.details.get("search") is not None:
        return _search_text(record.details["search"])
    return ""


def _deploy_text(found: Mapping[str, Any]) -> str:
    profile = f" of profile {found['profile']}" if found["profile"] else ""
    lines = [f"deployment{profile}: {found['cell']}", f"  checked on {found['checked_on']}"]
    if found.get("meant_for"):
        lines[-1] += f"; the profile is meant for {found['meant_for']}"
    checks = found["checks"]
    width = max(len(check["name"]) for check in checks)
    states = max(len(state_of(check)) for check in checks)
    for check in checks:
        figure = f"{check['name']:{width}}  {shown(check['found'], check, words.NOT_MEASURED)}"
        if isinstance(check["wanted"], float):
            figure += f" (limit {shown(check['wanted'], check, '')})"
        lines.append(f"  {state_of(check):{states}}  {figure}: {check['why']}")
    failed = [check["name"] for check in checks if check["passed"] is False]
    said = f"not passed: {', '.join(failed)}" if failed else "passed"
    return "\n".join([*lines, f"  {said}; artefact: {found['artefact']}"])


def _search_text(found: Mapping[str, Any]) -> str:
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    width = max(len(row["label"]) for row in rows)
    lines = [f"search: {found['criterion']}"]
    lines += [f"  {row['label']:{width}}  {_row(row)}" for row in rows]
    chosen = next((row for row in rows if row["cell"] == found["chosen"]), None)
    if chosen is not None:
        lines.append(f"  chosen: {chosen['label']} ({chosen['cell']})")
    else:
        measured = [row for row in rows if row["increase"] is not None]
        closest = min(measured, key=lambda row: float(row["increase"]), default=None)
        near = f"; the closest is {closest['label']}" if closest else ""
        lines.append(f"  none is within the limit{near}")
    spent = found["evaluations"]
    made, exhaustive = f"{spent['made']:,}", f"{spent['exhaustive']:,}"
    lines.append(f"  {made} {spent['unit']} read; every cell on all of them: {exhaustive}")
    return "\n".join(lines)


def _row(row: Mapping[str, Any]) -> str:
    size = "size unknown" if row["bytes"] is None else f"{row['bytes'] / 1e6:9.3f} MB"
    if row["increase"] is None:
        return f"{size}  {row['verdict']}"
    interval = ""
    if row["low"] is not None and row["high"] is not None:
        interval = f" ({100 * row['low']:+.2f} to {100 * row['high']:+.2f})"
    return (
        f"{size}  {100 * row['increase']:+.2f} %{interval} on {row['windows']} windows: "
        f"{row['verdict']}"
    )
