"""The pages `documents.html` and `documents.md`: the documents' tables, cell by cell.

Each fact stands once, with what is printed, what the documents say of the same elsewhere, what
others published, what this project's rows say, and the verdict (`reports.documents.verdict`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from reports.blocks import Block
from reports.documents.advice import advice_blocks
from reports.documents.fact_rows import MOST_SHOWN, shown
from reports.documents.facts import Fact, Published
from reports.documents.listings import listings_blocks
from reports.documents.verdict import MEANINGS, Audit, Audited, Checked
from reports.layout import html_page, markdown_page
from reports.page import Page

HTML, MARKDOWN = "documents.html", "documents.md"


@dataclass(frozen=True)
class Print:
    """One figure of a quantity, with every fact that prints it and has the same verdict."""

    text: str
    verdict: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Contradiction:
    """A quantity of which the documents print figures that cannot all be right."""

    quantity: str
    prints: tuple[Print, ...]
    published: tuple[Published, ...]


def audit_files(page: Page) -> dict[str, bytes]:
    """Return the two pages by the names of their files."""
    context = {
        "page": page,
        "audit": page.audit,
        "contradictions": contradictions(page.audit),
        "by_document": by_document(page.audit),
        "more": _more(),
        "meanings": {name: MEANINGS[name] for name in MEANINGS if name in page.audit.counts},
        "sign": sign,
        "printed": printed,
        "place": place,
        "elsewhere": elsewhere,
        "conditions": conditions,
        "most": MOST_SHOWN,
    }
    return {
        HTML: html_page("documents.html.jinja", {}, **context).encode(),
        MARKDOWN: markdown_page("documents.md.jinja", **context).encode(),
    }


def by_document(audit: Audit) -> dict[str, list[Audited]]:
    """Return the tables by the document that they stand in."""
    found: dict[str, list[Audited]] = {name: [] for name in audit.titles}
    for table in audit.tables:
        found[table.table.document].append(table)
    return {name: tables for name, tables in found.items() if tables}


def contradictions(audit: Audit) -> list[Contradiction]:
    """Return the quantities whose printed figures exclude each other, in the documents' order."""
    same: dict[str, list[Checked]] = {}
    for checked in audit.facts:
        if checked.fact.quantity is not None and checked.fact.value is not None:
            same.setdefault(checked.fact.quantity, []).append(checked)
    return [
        Contradiction(quantity, _prints(found), found[0].published)
        for quantity, found in same.items()
        if max(_interval(one.fact)[0] for one in found) > min(_interval(o.fact)[1] for o in found)
    ]


def _interval(fact: Fact) -> tuple[float, float]:
    """Return the least and the largest figure that the fact allows."""
    value = math.nan if fact.value is None else fact.value
    if fact.relation == "<":
        return -math.inf, value
    if fact.relation == ">":
        return value, math.inf
    return value, value if fact.to is None else fact.to


_DECIMALS = re.compile(r"(?<![\d.])-?\d+\.\d+(?![\d.])")


def _prints(found: list[Checked]) -> tuple[Print, ...]:
    groups: dict[tuple[str, str], list[Fact]] = {}
    for one in found:
        groups.setdefault((printed(one.fact), one.verdict), []).append(one.fact)
    return tuple(Print(*key, tuple(facts)) for key, facts in groups.items())


def printed(fact: Fact) -> str:
    """Return the fact's figure with its relation and unit, empty where it has none."""
    if fact.value is None:
        return ""
    before = {"=": "", "<": "below ", ">": "above ", "~": "about "}[fact.relation]
    if fact.to is not None:
        return f"{before}{fact.value:,.15g} to {shown(fact.to, fact.unit)}"
    text, plain = shown(fact.value, fact.unit), f"{fact.value:,.15g}"
    # With the zeros that it is printed with, which a number does not keep: 5.70.
    digits = next((d for d in _DECIMALS.findall(fact.original) if float(d) == fact.value), plain)
    return before + text.replace(plain, digits, 1)


def place(fact: Fact) -> str:
    """Return where a fact stands."""
    return f"{fact.document}, {fact.section}"


def elsewhere(checked: Checked) -> dict[str, list[Fact]]:
    """Return what the documents print of the same quantity elsewhere, equal figures together."""
    found: dict[str, list[Fact]] = {}
    for fact in checked.elsewhere:
        found.setdefault(printed(fact) or fact.text, []).append(fact)
    return found


def conditions(checked: Checked) -> list[tuple[str, str]]:
    """Return (protocol, hardware) of the rows shown, each once; computed figures need none."""
    told = checked.figures[:MOST_SHOWN]
    return list(dict.fromkeys((figure.protocol, figure.hardware) for figure in told))


def sign(verdict: str) -> str:
    """Return the sign of a verdict."""
    return MEANINGS.get(verdict, ("·", ""))[0]


def _more() -> list[Block]:
    """Return what stands below the tables: the documents' listings, and what they advise."""
    return [*listings_blocks(), *advice_blocks()]
