"""What is written by hand of the documents' listings: `harness/listings.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).with_name("listings.yaml")
PROBES = Path(__file__).with_name("listing_probes")

CODE = ("code", "commands")
KINDS = (*CODE, "diagram", "formula", "pseudo code", "table", "notes")
"""What a listing holds; only `CODE` can run."""


@dataclass(frozen=True)
class Change:
    """A substitution in the text of a listing, and what it does in a few words."""

    find: str
    put: str
    says: str


@dataclass(frozen=True)
class Beside:
    """A file or folder put beside a listing: its place there, and what it is."""

    path: str
    says: str


@dataclass(frozen=True)
class Attempt:
    """One way to reach the core of a listing.

    Attributes:
        changes: names of substitutions, each of which must find its words.
        beside: names of what is put beside it.
        after: listings that run before it in the same program.
        probe: file of `harness/listing_probes` that looks at what the listing left.
        legacy: whether it is tried with the older interpreter too.
        today: whether it is tried with today's libraries.
        alone: whether the probe runs in the listing's place, which no program can run.
    """

    changes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    probe: str | None = None
    legacy: bool = False
    today: bool = True
    alone: bool = False


@dataclass(frozen=True)
class Entry:
    """One listing of a document.

    Attributes:
        id: the document's name and the listing's number.
        first, last: of a flattened listing, its first and last words.
        what: one of `KINDS`.
        wants: what it wants to do.
        not_run: why it is not run, None where it is.
        why: what the outcome means; names in braces are facts that the last probe found.
        instead: the command of this project that does what it wanted, None where there is none.
    """

    id: str
    document: str
    number: int
    digest: str
    section: str
    what: str
    wants: str
    why: str
    instead: str | None = None
    first: str | None = None
    last: str | None = None
    not_run: str | None = None
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True)
class Data:
    """Everything of the file; `files` by the document's name."""

    files: Mapping[str, Mapping[str, str]]
    changes: Mapping[str, Change]
    beside: Mapping[str, Beside]
    entries: tuple[Entry, ...]


def read_data(path: Path = DATA) -> Data:
    """Return the content of the file.

    Raises:
        ValueError: an entry has a field that is none, or names something that is not there.
    """
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    changes = {name: Change(**about) for name, about in found["changes"].items()}
    beside = {name: Beside(**about) for name, about in found["beside"].items()}
    entries = tuple(_entry(about) for about in found["listings"])
    known = {entry.id for entry in entries}
    for entry in entries:
        _check(entry, changes, beside, known)
    return Data(found["documents"], changes, beside, entries)


def _entry(about: dict[str, Any]) -> Entry:
    name = f"{about['document']}-{about['number']}"
    if wrong := sorted(set(about) - {field.name for field in fields(Entry)}):
        raise ValueError(f"listings.yaml: {name} has unknown fields: {', '.join(wrong)}")
    attempts = []
    for one in about.pop("attempts", ()):
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}
        attempts.append(Attempt(**given))
    return Entry(id=name, attempts=tuple(attempts), **about)


def _check(
    entry: Entry, changes: Mapping[str, Change], beside: Mapping[str, Beside], known: set[str]
) -> None:
    if entry.what not in KINDS:
        raise ValueError(f"listings.yaml: {entry.id} is one of {', '.join(KINDS)}")
    for attempt in entry.attempts:
        named = {*attempt.changes} - {*changes} | {*attempt.beside} - {*beside}
        named |= {*attempt.after} - known
        if attempt.probe and not (PROBES / f"{attempt.probe}.py").is_file():
            named.add(attempt.probe)
        if named:
            raise ValueError(f"listings.yaml: {entry.id} names {', '.join(sorted(named))}")
