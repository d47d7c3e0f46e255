"""What the five documents say, as data: `documents.yaml`, and figures published elsewhere.

A document's table, or a passage of it, is a `Table` of `Fact`s, one for each printed figure or
claim. Facts about the same thing carry the same `quantity`, whichever document they stand in; a
figure published elsewhere (`published.yaml`) joins them by that name. A fact's `ours` says which
row of this project answers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reports import entries

FORMS = ("value", "ratio", "increase", "share")
"""How a row's figure answers: itself, the other row's over it, its growth over that, it over that.

`ratio` is that of compression or speed-up as documents print them: above 1 is better.
"""

RELATIONS = ("=", "<", ">", "~")
"""What a fact says of its value: equal, below, above, about.

Without a value `>` says that the ratio of `ours` is above 1, that its row is the better one of two,
and `<` that it is the worse one.
"""

UNITS: Mapping[str, tuple[str, float]] = {
    "GB": ("B", 1e9),
    "MB": ("B", 1e6),
    "ratio to FP32": ("ratio", 1.0),
    "ratio to FP16": ("ratio", 1.0),
    "%": ("share", 0.01),
    "perplexity": ("perplexity", 1.0),
    "tokens/s": ("tokens/s", 1.0),
    "logits": ("logits", 1.0),
    "bits": ("bit", 1.0),
    "ms": ("s", 1e-3),
    "s": ("s", 1.0),
    "minutes": ("s", 60.0),
    "hours": ("s", 3600.0),
}
"""Unit of a fact -> the records' unit and what a printed figure is multiplied by to be in it.

Units that are not here count something that no record holds.
"""

SIZE, SPEED = 0.01, 0.1
"""Relative difference up to which a figure counts as reproduced: sizes and perplexity, speeds."""


@dataclass(frozen=True)
class Ours:
    """Which figure of this project answers a fact.

    Attributes:
        metric: of a row, as `computed_bytes`, `perplexity`, `decode_tokens_per_second`.
        where: what the row's record says, as `{model: llama-7b, method: rtn, bits: 4}`; without a
            model, a row of any.
        form: one of `FORMS`.
        over: what `where` is changed to for the other row, for every form but `value`.
        protocol: what the figure's protocol begins with, None: the group's main one.
    """

    metric: str
    where: Mapping[str, Any]
    form: str = "value"
    over: Mapping[str, Any] | None = None
    protocol: str | None = None

    @property
    def other(self) -> dict[str, Any]:
        """What the other row's record says; another method brings its own bits and options."""
        over = dict(self.over or {})
        kept = ("model", "hardware") if "method" in over else tuple(self.where)
        return {**{key: self.where[key] for key in kept if key in self.where}, **over}


@dataclass(frozen=True)
class Fact:
    """One printed figure or claim of one document.

    Attributes:
        row, column: its place in the table, None for a claim in prose.
        says: its content in English, None where row, column and value say it.
        original: the text as printed.
        subject: what rows a claim is about, None for the figure of a table.
        quantity: what it is a figure of, the same for all documents.
        value, to: the figure; `to` ends a range. None where the document gives none.
        relation: one of `RELATIONS`.
        hardware: the document's, None where it names none.
        command: what measures it, on which model and card.
        needs: what that takes and a small machine has not, as a card or gated weights.
    """

    id: str
    table: Table
    row: str | None
    column: str | None
    says: str | None
    original: str
    subject: str | None
    quantity: str | None
    model: str | None
    method: str | None
    metric: str | None
    protocol: str | None
    value: float | None
    to: float | None
    relation: str
    unit: str | None
    hardware: str | None
    ours: Ours | None
    command: str
    needs: str | None = None

    @property
    def document(self) -> str:
        """Name of the document."""
        return self.table.document

    @property
    def section(self) -> str:
        """Where in the document."""
        return self.table.section

    @property
    def text(self) -> str:
        """What the fact says, in one line."""
        return self.says or f"{self.row}, {self.column}"


@dataclass(frozen=True)
class Table:
    """A table of a document, or a passage with figures or claims."""

    id: str
    document: str
    section: str
    title: str
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class Published:
    """A figure of a quantity that somebody else published, with the protocol and the source."""

    quantity: str
    value: float
    unit: str
    protocol: str
    source: str


@dataclass(frozen=True)
class Documents:
    """All tables in their order; `titles` by the document's name, `published` by quantity."""

    titles: Mapping[str, str]
    tables: tuple[Table, ...]
    published: Mapping[str, tuple[Published, ...]]

    @property
    def facts(self) -> tuple[Fact, ...]:
        """Every fact, in the order of the tables."""
        return tuple(fact for table in self.tables for fact in table.facts)


_OWN = tuple(f.name for f in fields(Fact) if f.name != "table")
_TABLE = ("id", "document", "section", "title", "facts")
_DEFAULTS: dict[str, Any] = {"relation": "="}

_WHOLE = {"documents": entries.by_name(entries.mapping), "tables": entries.several(entries.mapping)}
_OF_TABLE: dict[str, entries.Kind] = {
    **dict.fromkeys(("id", "document", "section", "title"), entries.text),
    "facts": entries.several(entries.mapping),
}
_FACT: dict[str, entries.Kind] = {
    **dict.fromkeys(_OWN, entries.optional(entries.text)),
    **dict.fromkeys(("value", "to"), entries.optional(entries.number)),
    "ours": entries.optional(entries.mapping),
}
_OURS: dict[str, entries.Kind] = {
    **dict.fromkeys(("metric", "form"), entries.text),
    "protocol": entries.optional(entries.text),
    "over": entries.optional(entries.by_name(entries.scalar)),
}
_PUBLISHED: dict[str, entries.Kind] = {
    **dict.fromkeys(("quantity", "unit", "protocol", "source"), entries.text),
    "value": entries.number,
}


@cache
def documents() -> Documents:
    """Return everything of `documents.yaml` and `published.yaml`.

    Raises:
        ValueError: an entry has a field that is none, lacks one, or contradicts another; the
            sentence names the entry.
    """
    here = Path(__file__).parents[1]
    return read_documents(
        entries.read_yaml(here / "documents.yaml"), entries.read_yaml(here / "published.yaml")
    )


def read_documents(found: Any, elsewhere: Any) -> Documents:
    """Return what the content of `documents.yaml` and of `published.yaml` says.

    Raises:
        ValueError: as `documents`.
    """
    entries.check_entry(found, "documents.yaml", _WHOLE)
    if missing := [key for key in _WHOLE if key not in found]:
        raise ValueError(f"documents.yaml lacks {', '.join(missing)}")
    titles = {name: _title(name, about) for name, about in found["documents"].items()}
    tables = tuple(read_table(entry, titles) for entry in found["tables"])
    every = [fact.id for table in tables for fact in table.facts]
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise ValueError(f"documents.yaml: more than one fact is called {', '.join(twice)}")
    published: dict[str, tuple[Published, ...]] = {}
    if not entries.several(entries.mapping)(elsewhere):
        raise ValueError("published.yaml is no list of entries")
    for entry in elsewhere:
        one = read_published(entry)
        published[one.quantity] = (*published.get(one.quantity, ()), one)
    return Documents(MappingProxyType(titles), tables, MappingProxyType(published))


def _title(name: str, about: Mapping[str, Any]) -> str:
    where = f"documents.yaml: {name}"
    entries.check_entry(about, where, dict.fromkeys(("title", "file"), entries.text))
    if not about.get("title") or not about.get("file"):
        raise ValueError(f"{where} lacks its title or its file")
    return f"{about['title']} ({about['file']})"


def read_table(entry: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    """Return a table of the file; what it says beside its own fields holds for all its facts.

    Raises:
        ValueError: as `documents`.
    """
    name = str(entry.get("id"))
    if missing := [key for key in _TABLE if key not in entry]:
        raise ValueError(f"documents.yaml: the table {name} lacks {', '.join(missing)}")
    entries.check_entry(entry, f"documents.yaml: the table {name}", _OF_TABLE)
    if entry["document"] not in titles:
        raise ValueError(f"documents.yaml: {name} names no document: {entry['document']}")
    shared = {key: value for key, value in entry.items() if key not in _TABLE}
    table = Table(name, entry["document"], entry["section"], entry["title"])
    made = tuple(_fact(_joined(shared, fact), table) for fact in entry["facts"])
    return Table(table.id, table.document, table.section, table.title, made)


def read_published(entry: Mapping[str, Any]) -> Published:
    """Return an entry of `published.yaml`.

    Raises:
        ValueError: as `documents`.
    """
    wanted = {f.name for f in fields(Published)}
    if wrong := sorted(wanted ^ set(entry)):
        raise ValueError(f"published.yaml: {entry.get('quantity')} lacks or has no {wrong[0]}")
    entries.check_entry(entry, f"published.yaml: {entry['quantity']}", _PUBLISHED)
    return Published(**entry)


def _joined(shared: Mapping[str, Any], fact: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fact with its table's defaults; `ours` of the table completes that of a fact."""
    ours = fact.get("ours")
    if ours is not None:
        for one in (ours, shared.get("ours", {})):
            entries.check_entry(one, f"documents.yaml: ours of {fact.get('id')}", _OURS)
            if not all(map(entries.scalar, {**one, "over": None}.values())):
                raise ValueError(f"documents.yaml: ours of {fact.get('id')} names no single row")
        ours = {**shared.get("ours", {}), **ours}
    return {**_DEFAULTS, **shared, **fact, "ours": ours}


def _fact(entry: Mapping[str, Any], table: Table) -> Fact:
    name = f"documents.yaml: {entry.get('id', f'a fact of {table.id}')}"
    if wrong := sorted(set(entry) - set(_OWN)):
        raise ValueError(f"{name} has unknown fields: {', '.join(wrong)}")
    entries.check_entry(entry, name, _FACT)
    if missing := [key for key in ("id", "original", "command") if not entry.get(key)]:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    if not entry.get("says") and not (entry.get("row") and entry.get("column")):
        raise ValueError(f"{name} needs a sentence (says) or its place in the table (row, column)")
    if entry["relation"] not in RELATIONS:
        raise ValueError(f"{name}: a relation is one of {', '.join(RELATIONS)}")
    if (entry.get("value") is None) != (entry.get("unit") is None):
        raise ValueError(f"{name} has a value without a unit, or a unit without a value")
    if entry.get("to") is not None and entry.get("value") is None:
        raise ValueError(f"{name} ends a range (to) that has no value to begin with")
    given: dict[str, Any] = {key: entry.get(key) for key in _OWN if key != "ours"}
    return Fact(**given, table=table, ours=_ours(entry.get("ours"), name))


def _ours(entry: Mapping[str, Any] | None, name: str) -> Ours | None:
    if entry is None:
        return None
    own = ("metric", "form", "over", "protocol")
    # A fact that names no model takes its table's back with null.
    where = {key: value for key, value in entry.items() if key not in own and value is not None}
    form = str(entry.get("form", "value"))
    if not entry.get("metric") or form not in FORMS:
        raise ValueError(f"{name}: ours needs a metric and a form of {', '.join(FORMS)}")
    if (form == "value") == ("over" in entry):
        raise ValueError(f"{name}: ours is over another row unless its form is value")
    return Ours(entry["metric"], where, form, entry.get("over"), entry.get("protocol"))
