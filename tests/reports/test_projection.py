from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from harness.record import Record, Value
from reports.gather import make_groups, make_rows
from reports.projection import Projection, bound, cards, project, projection_blocks, read_card
from reports.rows import Group
from tests.reports.synthetic import Synthetic, changed, simulated, with_random_weights

LLAMA_7B = {"fp16": 13.2e9, "int4 g128": 3.60e9, "int2 g64": 2.08e9}
LIMITS = {
    ("fp16", "RTX 3090"): 71,
    ("fp16", "RTX 4090"): 76,
    ("fp16", "A100 80 GB SXM"): 154,
    ("int4 g128", "RTX 3090"): 260,
    ("int4 g128", "RTX 4090"): 280,
    ("int4 g128", "A100 80 GB SXM"): 566,
    ("int2 g64", "RTX 4090"): 484,
}
"""Tokens/s of LLaMA-7B's matrices and FP16 head at batch 1, worked out by hand elsewhere."""


def computed(read: float, stored: float) -> Record:
    """A record of suite=size_only, as the arithmetic leaves it."""
    record = Synthetic("llama-7b").grid()[0]
    figures = (
        ("computed_bytes", stored),
        ("read_bytes_per_token", read),
    )
    values = tuple(
        Value("size", name, "computed", value, "B", higher_is_better=None)
        for name, value in figures
    )
    return replace(record, values=values, details={"notes": []})


def group(*records: Record) -> Group:
    return make_groups(make_rows(records))[0]


def table(found: Group) -> dict[str, dict[str, tuple[str, float | None]]]:
    """Return row -> head -> (text, number) of the block's table."""
    (block,) = projection_blocks(found)
    speeds = block.grids[0]
    heads = [head.text for head in speeds.heads]
    return {
        line[0].text: {
            head: (field.text, field.value) for head, field in zip(heads, line, strict=True)
        }
        for line in speeds.lines
    }


@pytest.mark.parametrize(("case", "wanted"), LIMITS.items())
def test_the_bounds_are_those_of_the_limits_table(case: tuple[str, str], wanted: int) -> None:
    weights, name = case
    card = next(card for card in cards() if card.name == name)
    assert bound(card.bytes_per_second, LLAMA_7B[weights]) == pytest.approx(wanted, rel=0.01)


def test_every_column_of_a_card_is_called_projected() -> None:
    (block,) = projection_blocks(group(computed(3.6e9, 3.9e9)))
    heads = [head.text for head in block.grids[0].heads]
    for card in cards():
        assert f"Projected: {card.name}" in heads
    assert sum(head.startswith("Projected") for head in heads) == len(cards()) + 1
    assert "datasheet" in block.legend
    assert "KV cache" in block.legend
    assert {line[3].text for line in block.grids[1].lines} == {card.source for card in cards()}


def test_computed_rows_have_bounds_and_no_share() -> None:
    (line,) = table(group(computed(3.6e9, 3.9e9))).values()
    text, value = line["Projected: RTX 3090"]
    assert (text, value) == ("260", 260)
    assert line["Projected: this machine"] == ("not measured", None)
    assert "Measured on this machine" not in line


def test_what_does_not_fit_is_said() -> None:
    (line,) = table(group(computed(35e9, 35.5e9))).values()
    assert line["Projected: RTX 4090"][0].endswith("too large")
    assert line["Projected: A100 40 GB"][0] == "44.4"
    assert line["Projected: Apple M2 Max"][0].endswith("needs 64 GB")
    (line,) = table(group(computed(150e9, 150e9))).values()
    assert line["Projected: H200"][0] == "32, too large"


def test_a_size_that_is_not_known_is_not_called_fitting() -> None:
    record = computed(3.6e9, 3.9e9)
    record = replace(record, values=record.values[1:])
    (line,) = table(group(record)).values()
    assert line["Projected: H200"][0].endswith("size unknown")


def test_a_measured_row_uses_what_its_speed_counted() -> None:
    record = Synthetic().grid()[7]
    for metric, value in (
        ("decode_tokens_per_second", 50.0),
        ("achieved_bytes_per_second", 2e9),
        ("copy_bytes_per_second", 8e9),
    ):
        record = changed(record, metric, value=value)
    (one,) = project(group(record))
    assert one.read == pytest.approx(4e7)
    assert one.here == pytest.approx(200)
    assert one.reached == pytest.approx(0.25)
    (line,) = table(group(record)).values()
    assert line["Share of its bound reached"][0] == "25.0"
    assert line["Projected: this machine (Synthetic CPU)"][0] == "200"


def test_measured_and_computed_rows_stand_in_one_table() -> None:
    record = replace(computed(3.6e9, 3.9e9), cell="computed")
    lines = table(group(Synthetic("llama-7b").grid()[7], record))
    shares = [line["Share of its bound reached"][1] for line in lines.values()]
    assert sum(share is None for share in shares) == 1
    assert len(shares) == 2


def test_only_one_sequence_at_a_time_is_projected() -> None:
    record = changed(Synthetic().grid()[7], "decode_tokens_per_second", protocol="p128_batch4")
    assert project(group(record)) == []
    assert projection_blocks(group(record)) == []


def test_simulated_rows_have_none_and_random_weights_do() -> None:
    record = Synthetic().grid()[7]
    assert projection_blocks(group(simulated(record))) == []
    assert len(project(group(with_random_weights(record)))) == 1


def test_weights_in_the_caches_are_said() -> None:
    record = Synthetic().grid()[7]
    point = {"protocol": "prompt128_depth256_batch1", "weights_fit_into_caches": True}
    record = replace(record, details={**record.details, "speed": {"points": [point]}})
    (block,) = projection_blocks(group(record))
    assert any("fit into the caches" in sentence for sentence in block.sentences)
    assert any("100 MB" in sentence for sentence in block.sentences)


def test_no_bound_without_a_bandwidth() -> None:
    (row,) = make_rows([Synthetic().grid()[0]])
    one = Projection(row, 1e9, None, None, 20.0, cached=False)
    assert one.here is None
    assert one.reached is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": None}, "Toaster lacks.*source"),
        ({"colour": "red"}, "Toaster lacks.*colour"),
        ({"memory_gigabytes": []}, "Toaster needs a bandwidth"),
        ({"gigabytes_per_second": 0}, "Toaster needs a bandwidth"),
    ],
)
def test_a_card_that_is_not_whole_is_refused(changes: dict[str, Any], said: str) -> None:
    whole = {
        "name": "Toaster",
        "gigabytes_per_second": 1,
        "memory_gigabytes": [1],
        "source": "its manual",
    }
    entry = {key: value for key, value in {**whole, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=said):
        read_card(entry)
