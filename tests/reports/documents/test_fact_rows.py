"""What reproduces a printed figure, and above all what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from harness.record import Record, Value
from reports.documents.fact_rows import NOT_HERE, Rows, answer, same_card, shown
from reports.documents.verdict import verdict
from tests.reports.documents.audit_made import (
    CARD,
    evidence,
    fact,
    perplexity,
    record,
    size,
    speed,
    with_values,
)
from tests.reports.synthetic import environment, simulated

SPEED_FACT: dict[str, Any] = {
    "metric": "speed",
    "value": 62,
    "unit": "tokens/s",
    "hardware": "RTX 3090",
    "ours": {"metric": "decode_tokens_per_second", "model": "llama-7b", "method": "gptq"},
}
SIZE_FACT: dict[str, Any] = {
    "metric": "size",
    "value": 3.9,
    "unit": "GB",
    "ours": {"metric": "computed_bytes", "model": "llama-7b", "method": "gptq", "bits": 4},
}


def rows_of(*records: Record) -> Rows:
    return Rows(evidence(*records))


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (5.85, "reproduced"),
        (5.85 * 1.0099, "reproduced"),
        (5.85 * 0.9901, "reproduced"),
        (5.85 * 1.011, "differs"),
        (5.85 * 0.989, "differs"),
    ],
)
def test_perplexity_is_reproduced_within_one_per_cent(ours: float, said: str) -> None:
    found = verdict(fact(), evidence(perplexity(ours)))
    assert found.verdict == said
    assert "gptq 4 bits g128, llama-7b" in found.why


def test_another_model_never_reproduces_and_is_shown() -> None:
    found = answer(fact(), rows_of(perplexity(5.85, model="llama-2-7b")))
    assert found.verdict is None
    assert [figure.row.model for figure in found.figures] == ["llama-2-7b"]
    said = verdict(fact(), evidence(perplexity(5.85, model="llama-2-7b")))
    assert said.verdict == NOT_HERE
    assert "deciding nothing (of another model): gptq 4 bits g128, llama-2-7b: 5.85" in said.why


@pytest.mark.parametrize(
    "protocol",
    [
        "wikitext2_llamacpp_512",
        "wikitext2_gptq_512",
        "wikitext2_gptq_2048_first24",
        "embedded_gptq_2048",
        "c4_gptq_2048",
    ],
)
def test_another_protocol_or_a_screening_never_reproduces(protocol: str) -> None:
    found = verdict(fact(), evidence(perplexity(5.85, protocol)))
    assert found.verdict == NOT_HERE
    named = fact(ours={**_where(), "protocol": "wikitext2_gptq"})
    if "first24" in protocol:
        assert verdict(named, evidence(perplexity(5.85, protocol))).verdict == NOT_HERE


def test_the_whole_text_goes_before_a_screening() -> None:
    both = with_values(
        record(),
        ("perplexity", "wikitext2_gptq_2048_first24", 9.0),
        ("perplexity", "wikitext2_gptq_2048", 5.85),
    )
    assert verdict(fact(), evidence(both)).verdict == "reproduced"


def test_another_method_bits_or_option_is_no_row() -> None:
    for changes in ({"method": "awq"}, {"bits": 3}, {"bits": None}):
        assert answer(fact(), rows_of(perplexity(5.85, **changes))).figures == ()
    wanted = fact(ours={**_where(), "act_order": True})
    assert answer(wanted, rows_of(perplexity(5.85))).figures == ()
    ordered = perplexity(5.85, options={"act_order": True})
    assert verdict(wanted, evidence(ordered)).verdict == "reproduced"


def test_simulated_rows_and_random_weights_answer_nothing_they_cannot_know() -> None:
    drawn = perplexity(5.85, random_weights=True)
    assert answer(fact(), rows_of(drawn)).figures == ()
    kernels = [{"layer": "L", "kernel": "k", "execution": "packed", "weights": 1}]
    timed = replace(speed(62), details={"kernels": kernels, "execution": "packed"})
    assert verdict(fact(**SPEED_FACT), evidence(timed)).verdict == "reproduced"
    assert answer(fact(**SPEED_FACT), rows_of(simulated(timed))).figures == ()


@pytest.mark.parametrize(
    ("gpu", "value", "said"),
    [
        (CARD, 62.0, "reproduced"),
        (CARD, 62 * 1.099, "reproduced"),
        (CARD, 62 * 1.101, "differs"),
        ("NVIDIA GeForce RTX 3090 Ti", 62.0, NOT_HERE),
        ("NVIDIA H200", 62.0, NOT_HERE),
    ],
)
def test_speed_needs_the_same_card(gpu: str, value: float, said: str) -> None:
    assert verdict(fact(**SPEED_FACT), evidence(speed(value, gpu))).verdict == said


def test_speed_without_a_named_card_cannot_be_reproduced() -> None:
    found = verdict(fact(**{**SPEED_FACT, "hardware": None}), evidence(speed(62)))
    assert found.verdict == NOT_HERE
    assert "the document names no card" in found.why


def test_a_processor_is_any_processor_and_a_card_is_its_name() -> None:
    assert same_card("RTX 3090", CARD)
    assert same_card("NVIDIA A100", "NVIDIA A100-SXM4-80GB")
    assert same_card("RTX 3090 (24 GB)", CARD)
    assert not same_card("RTX 3090", "NVIDIA GeForce RTX 4090")
    assert not same_card("RTX 3090", "AMD EPYC")
    assert not same_card("Apple M2", "Apple M2 Max")
    timed = replace(speed(62), environment=environment(device="cpu"))
    assert verdict(fact(**{**SPEED_FACT, "hardware": "CPU"}), evidence(timed)).verdict == (
        "reproduced"
    )


def test_a_computed_size_counts_as_ours() -> None:
    found = verdict(fact(**SIZE_FACT), evidence(size(3.8939e9)))
    assert found.verdict == "reproduced"
    (figure,) = answer(fact(**SIZE_FACT), rows_of(size(3.8939e9))).figures
    assert (figure.text, figure.protocol) == ("3.894 GB", "computed from the architecture")
    assert verdict(fact(**SIZE_FACT), evidence(size(4.1676e9))).verdict == "differs"
    ran = fact(**{**SIZE_FACT, "metric": "memory", "hardware": "RTX 3090"})
    assert verdict(ran, evidence(size(3.9e9))).verdict == NOT_HERE


def test_rows_that_disagree_are_not_reproduced() -> None:
    rows = evidence(perplexity(5.85), perplexity(6.2, group_size=32))
    assert verdict(fact(), rows).verdict == "holds in part here"


def test_ratios_increases_and_shares_are_of_two_rows() -> None:
    over = {"method": "fp16", "bits": 16}
    ratio = fact(
        metric="compression",
        value=3.46,
        unit="ratio to FP16",
        ours={**SIZE_FACT["ours"], "form": "ratio", "over": over},
    )
    base = size(13.4768e9, method="fp16", bits=16)
    assert verdict(ratio, evidence(size(3.8939e9))).verdict == "not measured here"
    assert verdict(ratio, evidence(base, size(3.8939e9))).verdict == "reproduced"
    grown = fact(value=3.0, unit="%", ours={**_where(), "form": "increase", "over": over})
    whole = perplexity(5.68, method="fp16", bits=16)
    assert verdict(grown, evidence(whole, perplexity(5.85))).verdict == "reproduced"
    assert verdict(grown, evidence(whole, perplexity(5.86))).verdict == "differs"
    other = perplexity(5.68, method="fp16", bits=16, model="llama-2-7b")
    assert answer(grown, rows_of(other, perplexity(5.85))).figures == ()
    faster = {**SPEED_FACT["ours"], "form": "ratio", "over": over}
    sped = fact(**{**SPEED_FACT, "value": 2.2, "unit": "ratio to FP16", "ours": faster})
    rows = evidence(speed(28, method="fp16", bits=16), speed(62))
    found = verdict(sped, rows)
    assert found.verdict == NOT_HERE
    assert "2.214x (+0.65 %) (two runs, not timed in turns)" in found.why


def test_a_claim_without_a_model_holds_here_or_does_not() -> None:
    over = {"method": "fp16", "bits": 16}
    ours = {"metric": "perplexity", "method": "gptq", "form": "increase", "over": over}
    claim = fact(model=None, value=1, unit="%", relation="<", ours=ours)
    base = perplexity(5.68, method="fp16", bits=16)
    assert verdict(claim, evidence(base, perplexity(5.70))).verdict == "holds here"
    assert verdict(claim, evidence(base, perplexity(5.85))).verdict == "does not hold here"
    both = evidence(base, perplexity(5.70), perplexity(5.85, group_size=32))
    assert verdict(claim, both).verdict == "holds in part here"
    assert verdict(claim, evidence()).verdict == NOT_HERE
    plain = fact(model=None, ours={"metric": "perplexity", "method": "gptq"})
    assert verdict(plain, evidence(perplexity(5.85))).verdict == NOT_HERE


def test_a_comparison_is_decided_beyond_the_tolerance() -> None:
    ours = {"metric": "perplexity", "method": "awq", "form": "ratio", "over": {"method": "gptq"}}
    claim = fact(model=None, value=None, unit=None, relation=">", ours=ours)
    for awq, said in ((5.5, "holds here"), (6.2, "does not hold here"), (5.86, UNDECIDED)):
        rows = evidence(perplexity(5.85), perplexity(awq, method="awq"))
        assert verdict(claim, rows).verdict == said


def test_a_share_of_scores_may_be_a_point_away_and_of_sizes_one_per_cent() -> None:
    def scored(method: str, score: float) -> Record:
        value = Value("tasks", "acc_norm", "hellaswag_0shot", score, "share", True)
        return replace(record(method=method), values=(value,))

    over = {"method": "fp16"}
    ours = {"metric": "acc_norm", "method": "gptq", "form": "share", "over": over}
    claim = fact(model=None, value=99, unit="%", ours=ours)
    rows = evidence(scored("fp16", 0.5), scored("gptq", 0.5))
    assert verdict(claim, rows).verdict == "holds here"
    rows = evidence(scored("fp16", 0.5), scored("gptq", 0.48))
    assert verdict(claim, rows).verdict == "does not hold here"
    part = [
        replace(one, values=(replace(one.values[0], protocol="hellaswag_0shot_limit60"),))
        for one in (scored("fp16", 0.5), scored("gptq", 0.5))
    ]
    assert verdict(claim, evidence(*part)).verdict == UNDECIDED
    shared = fact(value=35, unit="%", ours={**SIZE_FACT["ours"], "form": "share", "over": over})
    base = size(1e9, method="fp16")
    assert verdict(shared, evidence(base, size(0.3532e9))).verdict == "reproduced"
    assert verdict(shared, evidence(base, size(0.3548e9))).verdict == "differs"


UNDECIDED = "cannot be decided here"


def test_bounds_and_ranges() -> None:
    between = fact(value=5.8, to=5.9)
    assert verdict(between, evidence(perplexity(5.85))).verdict == "reproduced"
    found = verdict(between, evidence(perplexity(6.1)))
    assert found.verdict == "differs"
    assert "above the range" in found.why
    below = fact(value=6, relation="<")
    assert verdict(below, evidence(perplexity(5.85))).verdict == "reproduced"
    assert verdict(below, evidence(perplexity(6.05))).verdict == "differs"


def test_nothing_is_reproduced_without_rows() -> None:
    found = verdict(fact(hardware="RTX 3090"), evidence())
    assert found.verdict == NOT_HERE
    assert found.why == "Needs llama-7b on RTX 3090."
    assert verdict(fact(needs="a card of 24 GB"), evidence()).why == "Needs a card of 24 GB."


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.9, "GB", "3.9 GB"),
        (3.46, "ratio to FP16", "3.46x"),
        (5.68, "perplexity", "5.68"),
        (-84, "code", "-84"),
        (0.7, "%", "0.7 %"),
    ],
)
def test_figures_are_told_as_documents_print_them(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text


def _where() -> dict[str, object]:
    return {"metric": "perplexity", "model": "llama-7b", "method": "gptq", "bits": 4}


def test_the_demonstration_model_decides_nothing_about_others() -> None:
    claim = fact(
        model=None,
        value=1,
        unit="%",
        relation="<",
        ours={
            "metric": "perplexity",
            "form": "increase",
            "over": {"method": "fp16", "bits": 16},
            "bits": 4,
        },
    )
    rows = [
        with_values(record("tiny", method, bits=bits), ("perplexity", "text", value))
        for method, bits, value in (("fp16", 16, 10.0), ("gptq", 4, 10.05))
    ]
    assert verdict(claim, evidence(*rows)).verdict == "holds here"
    shown = [replace(one, details={"model": {"kind": "embedded"}}) for one in rows]
    found = verdict(claim, evidence(*shown))
    assert found.verdict == "cannot be decided here"
    assert "demonstration model, which decides nothing" in found.why
    assert "0.5 %" in found.why


def test_speeds_of_two_runs_decide_nothing() -> None:
    claim = fact(
        model=None,
        value=None,
        unit=None,
        relation=">",
        says="GPTQ is faster.",
        ours={
            "metric": "decode_tokens_per_second",
            "form": "ratio",
            "over": {"method": "fp16", "bits": 16},
            "method": "gptq",
        },
    )
    rows = [
        with_values(record("tiny", method, bits=bits), ("decode_tokens_per_second", "d", value))
        for method, bits, value in (("fp16", 16, 10.0), ("gptq", 4, 30.0))
    ]
    found = verdict(claim, evidence(*rows))
    assert found.verdict == "cannot be decided here"
    assert "not timed in turns decide nothing" in found.why
