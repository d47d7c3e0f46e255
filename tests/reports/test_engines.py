"""The same unquantized model on several engines, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from harness.record import Record
from reports.engines import KL_TOLERANCES, PERPLEXITY_TOLERANCE, engine_tables, engine_warnings
from reports.gather import make_groups, make_rows
from reports.page import make_page
from reports.render import html, markdown
from reports.rows import Group
from tests.reports.synthetic import PERPLEXITY, Synthetic

KL_TOLERANCE = KL_TOLERANCES["float16"]

METHODS = (("fp16", "pytorch"), ("gguf_F16", "llama.cpp"), ("onnx_fp16", "onnxruntime"))


def crossing(perplexity: float = 1.0, kl: float = 1e-7, **details: Any) -> list[Record]:
    """Return three engines' records, the last with its figures changed."""
    made = []
    for method, runtime in METHODS:
        record = Synthetic().cell(method, 16, None, "packed", "kernel")
        last = method == METHODS[-1][0]
        values = tuple(
            replace(value, value=5.0 * (perplexity if last else 1.0))
            if value.metric == "perplexity"
            else replace(value, value=kl if last else 1e-7)
            if value.metric == "kl_mean"
            else value
            for value in record.values
        )
        facts = {**record.details, "runtime": runtime, "unquantized": "float16", **details}
        made.append(replace(record, values=values, details=facts))
    return made


def group_of(records: list[Record]) -> Group:
    (group,) = make_groups(make_rows(records))
    return group


def test_engines_stand_side_by_side_pytorch_first() -> None:
    (table,) = engine_tables(group_of(crossing()))
    assert table.dtype == "float16"
    assert ("perplexity", PERPLEXITY) in table.columns
    assert table.lines[0].runtime == "pytorch"
    assert {line.verdict for line in table.lines} == {"agrees"}
    place = table.columns.index(("perplexity", PERPLEXITY))
    assert [line.cells[place] for line in table.lines] == ["5", "5 (+0.0000 %)", "5 (+0.0000 %)"]
    assert engine_warnings(group_of(crossing())) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"perplexity": 1 + 1.5 * PERPLEXITY_TOLERANCE},
        {"perplexity": float("nan")},
        {"kl": 1.5 * KL_TOLERANCE},
        {"kl": float("nan")},
    ],
)
def test_a_difference_is_a_warning_at_the_top_of_the_report(changed: dict[str, float]) -> None:
    records = crossing(**changed)
    (sentence,) = engine_warnings(group_of(records))
    assert "onnx_fp16" in sentence
    assert "gguf_F16" not in sentence
    page = make_page(records)
    assert page.banners[0] == sentence
    assert sentence in html(page, {figure.name: _blank() for figure in page.sections[0].figures})
    assert "| differs |" in markdown(page)


def test_what_storing_costs_every_engine_is_no_difference() -> None:
    costly = [
        replace(
            record,
            values=tuple(
                replace(value, value=value.value + 0.01) if value.metric == "kl_mean" else value
                for value in record.values
            ),
        )
        for record in crossing()
    ]
    assert engine_warnings(group_of(costly)) == []


def test_within_the_tolerance_they_agree() -> None:
    records = crossing(perplexity=1 + 0.5 * PERPLEXITY_TOLERANCE, kl=0.5 * KL_TOLERANCE)
    assert engine_warnings(group_of(records)) == []
    assert "| agrees |" in markdown(make_page(records))


@pytest.mark.parametrize("details", [{"runtime": "pytorch"}, {"unquantized": None}])
def test_one_engine_alone_and_quantized_rows_are_no_comparison(details: dict[str, Any]) -> None:
    assert engine_tables(group_of(crossing(**details))) == []


def _blank() -> Any:
    class Drawing:
        svg = "<svg></svg>"

    return Drawing()
