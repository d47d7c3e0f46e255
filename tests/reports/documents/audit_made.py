"""Facts and records made up for the audit of documents: what a test needs, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from harness.record import Record, Value
from reports.documents.evidence import Evidence
from reports.documents.facts import Documents, Fact, read_table
from reports.gather import make_groups, make_rows
from tests.reports.synthetic import environment

TITLES = {"guide": "A guide (guide.txt)", "chapter": "A chapter (chapter.txt)"}
CARD = "NVIDIA GeForce RTX 3090"


def fact(**changes: Any) -> Fact:
    """Return a fact: LLaMA-7B's perplexity in 4 bits, with `changes`."""
    entry: dict[str, Any] = {
        "id": "one",
        "row": "GPTQ",
        "column": "perplexity",
        "original": "5.85",
        "quantity": "llama-7b gptq 4 bits wikitext2 perplexity",
        "model": "llama-7b",
        "method": "gptq 4 bits",
        "metric": "perplexity",
        "value": 5.85,
        "unit": "perplexity",
        "ours": {"metric": "perplexity", "model": "llama-7b", "method": "gptq", "bits": 4},
        "command": "python run.py model=llama-7b method=gptq bits=4",
        **changes,
    }
    table = {"id": "t", "document": "guide", "section": "1", "title": "T", "facts": [entry]}
    return read_table(table, TITLES).facts[0]


def documents_of(*tables: dict[str, Any]) -> Documents:
    """Return documents of these tables, nothing published."""
    return Documents(TITLES, tuple(read_table(table, TITLES) for table in tables), {})


def record(model: str = "llama-7b", method: str = "gptq", **config: Any) -> Record:
    """Return a record without values."""
    options = config.pop("options", {})
    name = "-".join(str(part) for part in (model, method, *config.values(), *options.values()))
    return Record(
        cell=name,
        status="ok",
        config={
            "model": model,
            "method": method,
            "bits": 4,
            "group_size": 128,
            "hardware": "cuda",
            "suite": "full",
            "baseline": "fp16",
            "command": f"python run.py model={model} method={method}",
            "resolved": {"method": {"name": method, **options}},
            **config,
        },
        environment=environment(gpu=CARD, device="cuda"),
    )


def with_values(base: Record, *values: tuple[str, str, float]) -> Record:
    """Return `base` with (metric, protocol, value)s."""
    return replace(base, values=tuple(_value(*value) for value in values))


def _value(metric: str, protocol: str, value: float) -> Value:
    measure = {"perplexity": "perplexity", "computed_bytes": "size"}.get(metric, "speed")
    better = {"perplexity": False, "computed_bytes": False}.get(metric, True)
    return Value(measure, metric, protocol, value, "made up", better)


def evidence(*records: Record) -> Evidence:
    """Return what a report of these records has."""
    return Evidence(tuple(make_groups(make_rows(records))), records)


def perplexity(value: float, protocol: str = "wikitext2_gptq_2048", **config: Any) -> Record:
    """Return a record with one perplexity."""
    return with_values(record(**config), ("perplexity", protocol, value))


def speed(value: float, gpu: str = CARD, **config: Any) -> Record:
    """Return a record with one decoding speed on a card."""
    made = with_values(
        record(**config),
        ("decode_tokens_per_second", "prompt128_depth128_batch1", value),
    )
    return replace(made, environment=environment(gpu=gpu, device="cuda"))


def size(value: float, **config: Any) -> Record:
    """Return a record with one computed size."""
    return with_values(record(suite="size_only", **config), ("computed_bytes", "computed", value))


def verdicts(found: Sequence[Any]) -> list[str]:
    """Return the verdict of each checked fact."""
    return [one.verdict for one in found]
