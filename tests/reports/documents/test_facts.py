from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reports.documents.facts import UNITS, Fact, Ours, documents, read_published, read_table

TITLES = {"guide": "A guide (guide.txt)"}
ROOT = Path(__file__).resolve().parents[3]
FOLDER = os.environ.get("QUANTBENCH_DOCUMENTS")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
CONTRADICTIONS = {
    "llama-7b awq 4 bits wikitext2 perplexity": {5.75, 5.78},
    "llama-7b gptq 8 bits wikitext2 perplexity": {5.72, 5.70},
    "llama-7b fp16 tokens/s": {28, 25},
    "llama-7b int8 tokens/s": {45, 35},
    "int8 static speed-up": {2.0, 1.8},
    "q4_0 bits a weight": {4.0, 4.5},
    "llama-7b fp16 size": {13.5, 14},
    "llama-7b int4 size": {3.5, 4},
    "llama-2-70b int4 size": {35, 40},
    "gpt2 fp32 size": {500, 497.35},
    "int8 dynamic accuracy kept": {99, 95},
    "gptq 4 bits accuracy kept": {95, 99},
    "calibration samples": {128, 1000},
}
"""Quantity -> the figures that stand side by side."""


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
        ({"to": 2}, "has no value to begin with"),
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


def test_the_table_completes_what_answers_a_fact() -> None:
    shared = {"metric": "perplexity", "model": "llama-7b"}
    entry = {**table(ours={"method": "awq"}), "ours": shared}
    (fact,) = read_table(entry, TITLES).facts
    assert fact.ours == Ours("perplexity", {"model": "llama-7b", "method": "awq"})
    entry = {**table(ours={"model": None, "method": "awq"}), "ours": shared}
    (fact,) = read_table(entry, TITLES).facts
    assert fact.ours == Ours("perplexity", {"method": "awq"})
    (fact,) = read_table({**table(), "ours": shared}, TITLES).facts
    assert fact.ours is None


def test_the_other_row_has_its_own_bits_and_options() -> None:
    where = {"model": "gpt2", "method": "rtn", "bits": 4, "group_size": 128, "hardware": "cpu"}
    other = Ours("computed_bytes", where, "ratio", {"method": "fp32"}).other
    assert other == {"model": "gpt2", "method": "fp32", "hardware": "cpu"}
    assert Ours("perplexity", where, "ratio", {"bits": 8}).other == {**where, "bits": 8}


def test_a_published_figure_that_is_not_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="size lacks or has no protocol"):
        read_published({"quantity": "size", "value": 1, "unit": "GB", "source": "a paper"})


@pytest.mark.parametrize(("quantity", "figures"), CONTRADICTIONS.items())
def test_what_contradicts_stands_side_by_side(quantity: str, figures: set[float]) -> None:
    found = [fact for fact in documents().facts if fact.quantity == quantity]
    assert figures <= {fact.value for fact in found}


def test_a_quantity_has_one_unit() -> None:
    found = documents()
    units: dict[str, set[str]] = {}
    for fact in found.facts:
        if fact.quantity and fact.unit:
            units.setdefault(fact.quantity, set()).add(fact.unit)
    for quantity, published in found.published.items():
        assert quantity in {fact.quantity for fact in found.facts}
        units.setdefault(quantity, set()).update(one.unit for one in published)
    assert not {quantity: of for quantity, of in units.items() if len(of) > 1}


def test_every_figure_is_one_that_is_printed() -> None:
    for fact in documents().facts:
        # A dash before a number is a sign at its beginning, and a range between two of them.
        found = NUMBER.findall(fact.original) + NUMBER.findall(fact.original.replace("-", " "))
        printed = {float(text) for text in found}
        for value in (fact.value, fact.to):
            assert value is None or value in printed, fact.id


def test_what_answers_is_of_a_metric_in_its_unit() -> None:
    of_metric = {"perplexity": "perplexity", "computed_bytes": "B", "peak_memory_bytes": "B"}
    of_metric |= {"decode_tokens_per_second": "tokens/s", "computed_bits_per_weight": "bit"}
    of_metric |= {"quantize_seconds": "s", "artefact_bytes": "B", "decode_speedup": "ratio"}
    of_form = {"ratio": "ratio", "increase": "share", "share": "share"}
    for fact in documents().facts:
        if fact.ours is None or fact.unit is None:
            continue
        unit = of_form.get(fact.ours.form) or of_metric.get(fact.ours.metric)
        assert unit is None or UNITS[fact.unit][0] == unit, fact.id


def test_commands_choose_what_there_is() -> None:
    groups = {group.name for group in (ROOT / "conf").iterdir() if group.is_dir()}
    for fact in documents().facts:
        for override in _overrides(fact.command):
            key, _, values = override.partition("=")
            group = key.lstrip("+").partition("@")[0]
            if group in groups:
                for value in values.split(","):
                    assert (ROOT / "conf" / group / f"{value}.yaml").is_file(), (fact.id, override)


def _overrides(command: str) -> Iterator[str]:
    for one in command.split(" && "):
        python, *rest = shlex.split(one)
        assert (python, rest[0]) == ("python", "run.py")
        swept = any("," in word and "[" not in word for word in rest)
        assert swept <= ("-m" in rest), f"{one} sweeps and lacks -m"
        yield from (word for word in rest[1:] if word != "-m")


@pytest.mark.skipif(FOLDER is None, reason="QUANTBENCH_DOCUMENTS names no folder of the documents")
def test_every_original_stands_in_its_document() -> None:
    found = documents()
    files = {name: title.rpartition("(")[2].rstrip(")") for name, title in found.titles.items()}
    texts = {
        name: _spaced((Path(FOLDER or "") / file).read_text(encoding="utf-8"))
        for name, file in files.items()
    }
    lost = []
    for fact in found.facts:
        text, at = texts[fact.document], 0
        for part in map(_spaced, fact.original.split(" ... ")):
            at = text.find(part, at)
            if at < 0:
                lost.append((fact.id, part))
                break
            at += len(part)
    assert not lost


def _spaced(text: str) -> str:
    return re.sub(r"\s+", " ", text)
