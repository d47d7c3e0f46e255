from __future__ import annotations

from typing import Any

import pytest

from reports.facts import Fact, Ours, documents, read_table

TITLES = {"guide": "A guide (guide.txt)"}


def table(**fact: Any) -> dict[str, Any]:
    whole = {"id": "speed", "says": "It is fast.", "original": "很快", "command": "python run.py"}
    return {
        "id": "guide-1",
        "document": "guide",
        "section": "part 1",
        "title": "Speeds",
        "hardware": "RTX 3090",
        "facts": [{**whole, **fact}],
    }


def test_what_is_committed_is_whole() -> None:
    found = documents()
    assert len(found.titles) == 5
    assert len({table.id for table in found.tables}) == len(found.tables)
    for fact in found.facts:
        assert fact.text
        assert fact.command.startswith(("python run.py", "python -m "))


def test_what_a_table_says_holds_for_its_facts() -> None:
    (fact,) = read_table(table(value=25, unit="tokens/s"), TITLES).facts
    assert (fact.hardware, fact.value, fact.relation) == ("RTX 3090", 25, "=")
    assert (fact.document, fact.section, fact.text) == ("guide", "part 1", "It is fast.")


def test_what_answers_a_fact() -> None:
    ours = {"metric": "computed_bytes", "form": "ratio", "over": {"method": "fp32"}, "bits": 4}
    (fact,) = read_table(table(ours=ours), TITLES).facts
    assert isinstance(fact, Fact)
    assert fact.ours == Ours("computed_bytes", {"bits": 4}, "ratio", {"method": "fp32"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colour": "red"}, "speed has unknown fields: colour"),
        ({"original": None}, "speed lacks original"),
        ({"says": None}, "needs a sentence"),
        ({"says": None, "row": "FP16"}, "its place in the table"),
        ({"value": 1}, "value without a unit"),
        ({"relation": "!"}, "a relation is one of =, <, >, ~"),
        ({"ours": {"bits": 4}}, "ours needs a metric"),
        ({"ours": {"metric": "kl_mean", "form": "ratio"}}, "over another row"),
    ],
)
def test_a_fact_that_is_not_whole_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_table(table(**changes), TITLES)


def test_a_table_that_is_not_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="guide-1 names no document: elsewhere"):
        read_table({**table(), "document": "elsewhere"}, TITLES)
    with pytest.raises(ValueError, match="the table guide-1 lacks section"):
        read_table({k: v for k, v in table().items() if k != "section"}, TITLES)
