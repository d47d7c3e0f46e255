"""Energy stands in the table of speed where a machine counts it, and only there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.record import Record, Value
from reports import protocols, words
from reports.page import make_page

PROTOCOL = "rapl_prompt128_new64_batch2"


def speed_metrics(records: list[Record]) -> list[str]:
    (section,) = make_page(records).sections
    (detail,) = [detail for detail in section.details if detail.title == "Speed"]
    return [column.metric for column in detail.table.columns]


def test_a_column_only_where_there_are_values(grid: list[Record]) -> None:
    assert not any("joules" in metric or "watts" in metric for metric in speed_metrics(grid))
    values = (
        Value("energy", "decode_joules_per_token", PROTOCOL, 0.25, "J/token", False),
        Value("energy", "idle_watts", PROTOCOL, 31.5, "W", None),
    )
    measured = [replace(grid[0], values=grid[0].values + values), *grid[1:]]
    assert speed_metrics(measured)[-2:] == ["decode_joules_per_token", "idle_watts"]


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("decode_joules_per_token", 2.5, "2.50 J/token"),
        ("prefill_above_idle_joules_per_token", 0.0042, "4.20 mJ/token"),
        ("idle_watts", 71.5, "71.5 W"),
    ],
)
def test_figures_have_their_unit(metric: str, value: float, text: str) -> None:
    assert words.figure(metric, value) == text
    assert words.title(metric) != metric.replace("_", " ")


@pytest.mark.parametrize("counter", ["rapl", "nvml_counter", "nvml_power"])
def test_the_protocol_says_what_is_counted(counter: str) -> None:
    sentence = protocols.protocol_sentence(f"{counter}_prompt128_new64_batch2")
    assert "all processes on" in sentence
    assert "prompts of 128 tokens and 64 tokens written after each, 2 sequences at once" in sentence
    assert "{" not in sentence
