"""The documents' code listings: what happened when they were run, and the command of ours.

Source: `listings.yaml`, which `python -m harness.listings` writes; nothing is run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from reports import entries, words
from reports.blocks import Block, Field, Grid, Head

NO_CODE = "no code"
VERDICTS = ("runs", "runs changed", "runs, wrong result", "does not run", "not run", NO_CODE)
"""What a listing can be, from the best."""

HUB, NO_HUB = "'https://huggingface.co'", "its model is on the hub, which is out of reach here"
SHOWN = 160
"""Characters of a message in the table; the outcomes hold more."""

LEGEND = (
    "As printed: the listing alone, in an empty folder. With its surroundings: what it expects is "
    "put beside it, its words are changed where needed, and it is run again; the last run is told, "
    "every run in the table below it. Runs: as printed, given what it expects. Runs changed: only "
    "with other words. Wrong result: it ends without an error and does not do what it wants. The "
    "line breaks of 004 were lost, so its listings are restated in lines of our own. No weights of "
    "the named models were there: small models stand in their places."
)


@cache
def _outcomes() -> Mapping[str, Any]:
    return read_outcomes(entries.read_yaml(Path(__file__).parents[1] / "listings.yaml"))


def read_outcomes(found: Any) -> Mapping[str, Any]:
    """Return the content of `listings.yaml`, held against what is shown of it.

    Raises:
        ValueError: an entry lacks a field or has one of another kind; the sentence names both.
    """
    _check(found, "listings.yaml", _WHOLE)
    for one in found["listings"]:
        where = f"listings.yaml: {one.get('id')}"
        _check(one, where, _LISTING)
        legacy = one["legacy"]
        for seen in [one] if legacy is None else [one, legacy]:
            _check(seen, where, _RUNS)
            ends = [] if seen["as_printed"] is None else [seen["as_printed"]]
            for ended in [*ends, *seen["with_surroundings"]]:
                _check(ended, f"{where}: a run", {"exit": _ENDED["exit"]})
                entries.check_entry(ended, f"{where}: a run", _ENDED)
                if ended["exit"] != 0 and "message" not in ended:
                    raise ValueError(f"{where}: a run that failed has no message")
                if ("line" in ended) != ("quote" in ended):
                    raise ValueError(f"{where}: a run has a line without its words")
        if one["verdict"] != NO_CODE and not one["not_run"] and one["as_printed"] is None:
            raise ValueError(f"{where} was neither run nor says why not")
        if legacy is not None and not legacy["with_surroundings"]:
            raise ValueError(f"{where} was not run beside what it expects with archived libraries")
    outcomes: Mapping[str, Any] = found
    return outcomes


def _check(found: Any, where: str, kinds: Mapping[str, entries.Kind]) -> None:
    entries.check_entry(found, where, kinds)
    if missing := [key for key in kinds if key not in found]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")


_WHOLE: dict[str, entries.Kind] = {
    "seen": entries.scalar,
    **dict.fromkeys(("versions", "legacy_versions"), entries.by_name(entries.scalar)),
    "listings": entries.several(entries.mapping),
}
_LISTING: dict[str, entries.Kind] = {
    **dict.fromkeys(("id", "section", "what", "wants", "why"), entries.text),
    **dict.fromkeys(("not_run", "instead"), entries.optional(entries.text)),
    "verdict": lambda found: found in VERDICTS,
    "legacy": entries.optional(entries.mapping),
}
_RUNS: dict[str, entries.Kind] = {
    "as_printed": entries.optional(entries.mapping),
    "with_surroundings": entries.several(entries.mapping),
}
_ENDED: dict[str, entries.Kind] = {
    "exit": entries.optional(entries.number),
    **dict.fromkeys(("exception", "message", "quote"), entries.text),
    "line": entries.number,
    "found": entries.by_name(entries.scalar),
    **dict.fromkeys(("beside", "changes"), entries.several(entries.text)),
}


def listings_blocks() -> list[Block]:
    """Return the block of all listings: those with code, each of their runs, and the others."""
    return blocks_of(_outcomes())


def blocks_of(found: Mapping[str, Any]) -> list[Block]:
    """Return the block of what `read_outcomes` returned."""
    listings = found["listings"]
    code = [one for one in listings if one["verdict"] != NO_CODE]
    rest = [one for one in listings if one["verdict"] == NO_CODE]
    return [
        Block(
            "The documents' code listings",
            (_count(listings), _with(found)),
            (),
            (
                Grid("Listings with code", _HEADS, tuple(_line(one) for one in code)),
                Grid(
                    "Every run of a listing",
                    _ATTEMPTS,
                    tuple(line for one in code for line in _attempts(one)),
                    folded=True,
                ),
                Grid(
                    "Blocks that hold no code",
                    (*_HEADS[:2], Head("It holds"), *_HEADS[2:3], *_HEADS[5:]),
                    tuple(_plain(one) for one in rest),
                    folded=True,
                ),
            ),
            LEGEND,
        )
    ]


_HEADS = (
    Head("Where"),
    Head("It wants to"),
    Head("As printed"),
    Head("With its surroundings"),
    Head("Verdict"),
    Head("Why"),
    Head("Instead"),
)
_ATTEMPTS = (
    Head("Where"),
    Head("Libraries"),
    Head("Given"),
    Head("Changed to have"),
    Head("Ended"),
)


def _line(one: Mapping[str, Any]) -> tuple[Field, ...]:
    tried = one["with_surroundings"]
    reached = [_ended(tried[-1])] if tried else []
    if one["legacy"] is not None:
        reached.append(f"archived libraries: {_ended(one['legacy']['with_surroundings'][-1])}")
    return (
        _where(one),
        Field(one["wants"]),
        Field(f"not run: {one['not_run']}" if one["not_run"] else _ended(one["as_printed"])),
        Field("; ".join(reached) or "–"),
        Field(one["verdict"]),
        Field(one["why"]),
        Field(one["instead"] or "–"),
    )


def _attempts(one: Mapping[str, Any]) -> list[tuple[Field, ...]]:
    """Return a line for each run of a listing, today's libraries first."""
    lines: list[tuple[Field, ...]] = []
    for name, seen in (("today's", one), ("archived", one["legacy"])):
        if seen is None or seen["as_printed"] is None:
            continue
        for ended in (seen["as_printed"], *seen["with_surroundings"]):
            beside, changes = (words.listed(ended.get(key, ())) for key in ("beside", "changes"))
            at = f" (line {ended['line']}: {ended['quote']})" if "line" in ended else ""
            told = (Field(name), Field(beside or "–"), Field(changes or "–"))
            lines.append((_where(one), *told, Field(_ended(ended) + at)))
    return lines


def _plain(one: Mapping[str, Any]) -> tuple[Field, ...]:
    printed = one["as_printed"]
    return (
        _where(one),
        Field(one["wants"]),
        Field(one["what"]),
        Field("not run" if printed is None else _ended(printed)),
        Field(one["why"]),
        Field(one["instead"] or "–"),
    )


def _where(one: Mapping[str, Any]) -> Field:
    return Field(f"{one['id']}, {one['section']}", language="zh")


def _ended(one: Mapping[str, Any]) -> str:
    raised = str(one.get("found", {}).get("raised", "nothing"))
    if raised != "nothing":
        return f"{_short(raised)} where it is used"
    if one["exit"] == 0:
        return "ends without an error"
    if "exception" not in one:
        return str(one["message"])
    message = NO_HUB if HUB in one["message"] else _short(one["message"])
    return f"{one['exception']}: {message}" if message else str(one["exception"])


def _short(message: str) -> str:
    return message if len(message) <= SHOWN else f"{message[:SHOWN].rstrip(' .')} ..."


def _count(listings: Sequence[Mapping[str, Any]]) -> str:
    found = [one["verdict"] for one in listings]
    counts = [f"{found.count(name)} {name}" for name in VERDICTS if name in found]
    code = len(found) - found.count(NO_CODE)
    return (
        f"Of {words.count(len(found), 'block')} in the documents {code} hold code or commands; "
        f"the verdicts: {'; '.join(counts)}."
    )


def _with(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    sentence = f"Seen on {found['seen']} with {versions}, on a processor, without network."
    if found["legacy_versions"]:
        older = ", ".join(f"{name} {version}" for name, version in found["legacy_versions"].items())
        sentence += f" The archived libraries: {older}."
    return sentence
