"""documents.html and documents.md: every fact once, everything escaped."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from harness.record import Record
from reports.documents.facts import Published
from reports.documents.pages import audit_files, contradictions, elsewhere, printed
from reports.documents.verdict import audit
from reports.page import Page, make_page
from reports.render import markdown as markdown_of
from tests.reports.documents.audit_made import documents_of, evidence, fact, perplexity
from tests.reports.synthetic import Synthetic, with_random_weights

MARKUP = "<script>alert('x')</script> | `y` **z**"


class Tables(HTMLParser):
    """Collects the tables of a page: the ids and the cells of their rows; and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[dict[str, str]] = []
        self.rows: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] += 1
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "a":
            self.links.append(str(found.get("href")))
        if tag == "table" and "cells" in str(found.get("class")):
            self.tables.append({})
        if tag == "tr" and "data-verdict" in found:
            self.rows.append(found)


def parsed(html: str) -> Tables:
    tables = Tables()
    tables.feed(html)
    return tables


def files(page: Page) -> tuple[str, str]:
    found = audit_files(page)
    assert set(found) == {"documents.html", "documents.md"}
    return found["documents.html"].decode(), found["documents.md"].decode()


@pytest.fixture(scope="module")
def page() -> Page:
    return make_page(Synthetic().grid())


def entry(name: str, **changes: object) -> dict[str, object]:
    return {
        "id": name,
        "row": "GPTQ",
        "column": "perplexity",
        "original": "5.85",
        "command": f"python run.py # {name}",
        **changes,
    }


def table(name: str, document: str, *facts: dict[str, object]) -> dict[str, object]:
    return {
        "id": name,
        "document": document,
        "section": f"section of {name}",
        "title": f"title of {name}",
        "facts": list(facts),
    }


def page_of(page: Page, *tables: dict[str, object], records: tuple[Record, ...] = ()) -> Page:
    found = evidence(*records)
    return replace(page, audit=audit(found.groups, records, documents_of(*tables)))


def test_one_table_a_table_and_every_fact_once(page: Page) -> None:
    html, markdown = files(page)
    found = parsed(html)
    facts = [one.fact for one in page.audit.facts]
    assert len(found.tables) == len(page.audit.tables)
    assert [row["id"] for row in found.rows] == [one.id for one in facts]
    assert [row["data-verdict"] for row in found.rows] == [o.verdict for o in page.audit.facts]
    assert max(Counter(found.ids).values()) == 1
    assert {t.table.id for t in page.audit.tables} <= set(found.ids)
    inside = [link[1:] for link in found.links if link.startswith("#")]
    assert set(inside) <= set(found.ids)
    assert markdown.count("| Row | Column | Documented |") == len(page.audit.tables)


def test_tables_have_captions_and_scopes(page: Page) -> None:
    html, _ = files(page)
    found = parsed(html)
    assert found.tags["caption"] == found.tags["table"]
    assert "<th>" not in html
    assert "http" not in "".join(link for link in found.links)


def test_the_main_page_counts_the_verdicts_of_every_table(page: Page) -> None:
    text = markdown_of(page)
    assert "## What the documents claim" in text
    assert "(documents.md)" in text
    for one in page.audit.tables:
        assert one.counted in text


def test_markup_is_text(page: Page) -> None:
    made = entry(
        "one",
        row=MARKUP,
        column=MARKUP,
        original=MARKUP,
        needs=MARKUP,
        command=MARKUP,
        quantity=MARKUP,
        value=1,
        unit=MARKUP,
    )
    other = table("b", "chapter", {**made, "id": "two", "value": 2})
    row = perplexity(5.85, model=MARKUP)
    third = table(
        "c",
        "chapter",
        entry("three", ours={"metric": "perplexity", "method": "gptq"}),
    )
    shown = page_of(page, table("a", "guide", made), other, third, records=(row,))
    titled = replace(shown, title=MARKUP)
    quantity = Published(MARKUP, 1.5, MARKUP, MARKUP, MARKUP)
    facts = tuple(replace(one, published=(quantity,)) for one in titled.audit.tables[0].facts)
    first = replace(titled.audit.tables[0], facts=facts)
    every = replace(titled.audit, tables=(first, *titled.audit.tables[1:]))
    html, markdown = files(replace(titled, audit=every))
    plain, _ = files(page_of(page, table("a", "guide", entry("one"))))
    assert parsed(html).tags["script"] == parsed(plain).tags["script"]
    assert "&lt;script&gt;alert" in html
    assert "<script>" not in markdown.replace("`<script>", "").replace("`` <script>", "")
    lines = [line for line in markdown.splitlines() if line.startswith("| ") and "alert(" in line]
    assert len(lines) == 4
    for line in lines:
        outside_code = re.sub(r"(`+).*?\1", "", line.replace("\\|", "").replace("\\`", ""))
        assert outside_code.count("|") in (4, 10), line


def test_contradictions_are_figures_that_exclude_each_other(page: Page) -> None:
    def quantity(name: str, what: str, value: float, **more: object) -> dict[str, object]:
        return entry(name, quantity=what, value=value, unit="x", **more)

    first = table(
        "a",
        "guide",
        quantity("a1", "speed", 28),
        quantity("a2", "range", 2, to=4),
        quantity("a3", "bound", 1, relation="<"),
        quantity("a4", "same", 7),
    )
    second = table(
        "b",
        "chapter",
        quantity("b1", "speed", 25),
        quantity("b2", "range", 3),
        quantity("b3", "bound", 2),
        quantity("b4", "same", 7),
        quantity("b5", "speed", 28),
    )
    shown = page_of(page, first, second)
    found = contradictions(shown.audit)
    assert [one.quantity for one in found] == ["speed", "bound"]
    assert [(p.text, [f.id for f in p.facts]) for p in found[0].prints] == [
        ("28 x", ["a1", "b5"]),
        ("25 x", ["b1"]),
    ]
    by_id = {one.fact.id: one for one in shown.audit.facts}
    assert {text: [f.id for f in facts] for text, facts in elsewhere(by_id["a1"]).items()} == {
        "25 x": ["b1"],
        "28 x": ["b5"],
    }
    html, markdown = files(shown)
    assert "Where the documents contradict each other" in html
    assert "28 x" in markdown


def test_what_is_not_measured_shows_its_command_and_what_it_needs(page: Page) -> None:
    shown = page_of(page, table("a", "guide", entry("one", needs="an RTX 3090")))
    html, markdown = files(shown)
    assert "Needs an RTX 3090." in html
    assert "python run.py # one" in html
    assert "python run.py # one" in markdown
    assert parsed(html).rows[0]["data-verdict"] == "not measured here"


def test_ours_stands_with_its_row_protocol_and_machine(page: Page) -> None:
    ours = {"metric": "perplexity", "model": "llama-7b", "method": "gptq"}
    made = entry("one", model="llama-7b", value=5.85, unit="perplexity", ours=ours)
    html, markdown = files(page_of(page, table("a", "guide", made), records=(perplexity(5.851),)))
    for text in (html.replace("<wbr>", ""), markdown):
        assert "gptq 4 bits g128, llama-7b" in text
        assert "wikitext2_gptq_2048" in text
        assert "NVIDIA GeForce RTX 3090" in text
        assert "reproduced" in text


def test_random_weights_show_no_quality(page: Page) -> None:
    made = entry("one", ours={"metric": "perplexity", "method": "gptq"}, unit="perplexity", value=5)
    drawn = with_random_weights(perplexity(5.851))
    (one,) = page_of(page, table("a", "guide", made), records=(drawn,)).audit.facts
    assert one.figures == ()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"value": 3, "to": 5, "unit": "%"}, "3 to 5 %"),
        ({"value": 1, "unit": "%", "relation": "<"}, "below 1 %"),
        ({"value": 4.8, "unit": "bits", "relation": "~"}, "about 4.8 bits"),
        ({"value": None, "unit": None}, ""),
    ],
)
def test_printed_figures(changes: dict[str, object], text: str) -> None:
    assert printed(fact(**changes)) == text


@pytest.mark.parametrize(
    ("value", "original", "said"),
    [(5.7, "| GPTQ | - | 5.70 |", "5.70"), (5.7, "5.72 and 15.70", "5.7"), (3.0, "3 GB", "3")],
)
def test_figures_keep_the_zeros_they_are_printed_with(
    value: float, original: str, said: str
) -> None:
    assert printed(fact(value=value, original=original)) == said
