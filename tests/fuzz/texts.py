"""Readers of the report's own YAML files: facts, figures elsewhere, cards, advice, listings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from reports import projection
from reports.documents import advice, facts, listings
from reports.entries import parse_yaml
from tests.fuzz.guard import ROOT
from tests.fuzz.mutation import json_changes
from tests.fuzz.target import Target

SEVERAL = 2
"""Entries of each file in a seed: a parser of YAML takes long."""


def _shipped(name: str) -> Any:
    text = (ROOT / "reports" / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_yaml(text, name)


def _written(found: Any) -> list[bytes]:
    """Return one content as YAML's own layout and as JSON, which is YAML too."""
    plain = yaml.safe_dump(found, allow_unicode=True, sort_keys=False).encode()
    return [json.dumps(found).encode(), plain]


def _document_seeds(folder: Path) -> Sequence[bytes]:
    found = _shipped("documents")
    tables = [{**table, "facts": table["facts"][:1]} for table in found["tables"]]
    asking = next(table for table in tables if table["facts"][0].get("ours"))
    first = {"guide": found["documents"]["guide"]}
    return [
        data
        for table in (tables[0], {**asking, "document": "guide"})
        for data in _written({"documents": first, "tables": [table]})
    ]


def _read_documents(data: bytes, folder: Path) -> None:
    found = facts.read_documents(_parsed(data), [])
    for fact in found.facts:
        _ = (fact.text, fact.document, fact.ours.other if fact.ours else None)


def _published_seeds(folder: Path) -> Sequence[bytes]:
    return _written(_shipped("published")[:SEVERAL])


def _read_published(data: bytes, folder: Path) -> None:
    facts.read_documents({"documents": {}, "tables": []}, _parsed(data))


def _card_seeds(folder: Path) -> Sequence[bytes]:
    return _written(_shipped("cards")[:SEVERAL])


def _read_cards(data: bytes, folder: Path) -> None:
    projection.read_cards(_parsed(data))


def _advice_seeds(folder: Path) -> Sequence[bytes]:
    trees = _shipped("advice")[:SEVERAL]
    return _written([{**tree, "entries": tree["entries"][:SEVERAL]} for tree in trees])


def _read_advice(data: bytes, folder: Path) -> None:
    found = advice.read_trees(_parsed(data))
    case = advice.Case("cpu", 7e9, frozenset(("speed",)), "low")
    for one in found:
        _ = (one.case, one.text, one.holds(case))
    advice.contradictions(found)


def _listing_seeds(folder: Path) -> Sequence[bytes]:
    found = _shipped("listings")
    run = next(one for one in found["listings"] if one["legacy"])
    plain = next(one for one in found["listings"] if one["verdict"] == listings.NO_CODE)
    return _written({**found, "listings": [run]}) + _written({**found, "listings": [plain]})


def _read_listings(data: bytes, folder: Path) -> None:
    listings.blocks_of(listings.read_outcomes(_parsed(data)))


def _parsed(data: bytes) -> Any:
    return parse_yaml(data.decode(errors="surrogateescape"), "input")


TARGETS = (
    Target("documents", _read_documents, (ValueError,), _document_seeds, json_changes()),
    Target("published", _read_published, (ValueError,), _published_seeds, json_changes()),
    Target("cards", _read_cards, (ValueError,), _card_seeds, json_changes()),
    Target("advice", _read_advice, (ValueError,), _advice_seeds, json_changes()),
    Target("listings", _read_listings, (ValueError,), _listing_seeds, json_changes(), longest=8192),
)
