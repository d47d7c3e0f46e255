from __future__ import annotations

from dataclasses import replace

import pytest

from harness.record import Record
from reports.documents import arithmetic
from reports.documents.audit import ABOUT, increase, subjects
from reports.documents.claims import ARITHMETIC
from reports.documents.evidence import DIFFERS, Evidence, Verdict
from reports.documents.facts import documents
from reports.documents.nanogpt_sizes import SHAKESPEARE_CHAR
from reports.documents.printed import PRINTED
from reports.documents.sums import ADDS_UP, CONTRADICTED, REMARK
from reports.documents.verdict import MEANINGS, audit, documents_blocks, verdict
from reports.gather import make_groups, make_rows
from reports.rows import Group
from tests.reports.advanced import every_kind, sensitivity_record
from tests.reports.synthetic import Synthetic, changed


def evidence(*, empty: bool = False) -> Evidence:
    records = Synthetic().grid() if empty else every_kind()
    return Evidence(tuple(make_groups(make_rows(records))), tuple(records))


def test_zeros_cost_their_positions() -> None:
    assert 32 / arithmetic.bitmap_bits(0.3, 8) == pytest.approx(4.848, abs=1e-3)
    assert 32 / arithmetic.bitmap_bits(0.0, 8) == pytest.approx(32 / 9)


def test_no_reading_of_nanogpts_size_is_the_printed_one() -> None:
    found = arithmetic.nanogpt_readings(SHAKESPEARE_CHAR)
    assert found["all parameters"] == 4 * 10_745_088
    assert found["without position embeddings"] == 4 * 10_646_784
    assert found["a checkpoint with AdamW's two moments"] == 12 * 10_745_088
    name, unit, value = arithmetic.nearest_reading(SHAKESPEARE_CHAR, 39.47)
    assert (name, unit) == ("matrices of the blocks", "MiB")
    assert abs(value / 39.47 - 1) > 0.02


def test_the_running_product_stops_after_one_layer() -> None:
    found = arithmetic.adaptive_quantizer([0.5, 0.02, 0.001], [100, 100, 100])
    assert found.bits == (8, 32, 32)
    assert found.claimed == 4
    assert found.true == pytest.approx(96 / 72)
    careless = arithmetic.adaptive_quantizer([0.001, 0.002], [100, 100], target=64)
    assert careless.bits == (4, 4)
    assert careless.claimed == 64
    assert careless.true == 8


def test_rounding_has_no_slope_and_no_bound() -> None:
    assert arithmetic.slope_in_input([x / 101 for x in range(-101, 102)]) == 0
    assert arithmetic.learnable_quantizer(5.0, 1.0, 0.0, bits=2) == pytest.approx(5.0)


def test_a_margin_of_loss_is_more_of_perplexity() -> None:
    assert arithmetic.loss_margin_as_perplexity(5.68) == pytest.approx(0.0535, abs=1e-4)


def test_every_check_is_of_a_fact() -> None:
    assert set(ARITHMETIC) | set(PRINTED) | set(ABOUT) <= {fact.id for fact in documents().facts}
    assert not set(ARITHMETIC) & set(PRINTED)


def test_arithmetic_goes_before_rows_and_both_are_told() -> None:
    by_id = {fact.id: fact for fact in documents().facts}
    nothing = evidence(empty=True)
    assert verdict(by_id["prune-quant-size"], nothing).verdict == CONTRADICTED
    assert "4.85x" in verdict(by_id["prune-quant-size"], nothing).why
    assert verdict(by_id["nanogpt-speed"], nothing).verdict == ADDS_UP
    assert verdict(by_id["first-last-critical"], nothing).verdict == "not measured here"


def test_claims_stand_only_where_the_report_has_something_about_them() -> None:
    assert subjects(evidence(empty=True)) == set()
    grid = Synthetic().grid()
    assert documents_blocks(audit(make_groups(make_rows(grid)), grid)) == []
    (block,) = documents_blocks(audit([], [sensitivity_record()]))
    about = [fact for fact in documents().facts if fact.subject == "sensitivity"]
    assert len(block.grids[0].lines) == len(about) > 0
    whys = {line[0].text: line[4].text for line in block.grids[0].lines}
    for fact in about:
        assert (fact.id in ABOUT or fact.id in ARITHMETIC) or "Measured by: " in whys[fact.text]
    assert subjects(evidence()) == {
        *("pruning", "mixed", "sensitivity", "calibration", "training", "distillation"),
        *("search", "deploy"),
    }


def test_without_rows_nothing_is_said_of_rows() -> None:
    found = audit([], [])
    assert {one.fact.id for one in found.facts} == {fact.id for fact in documents().facts}
    assert set(found.counts) <= {"not measured here", ADDS_UP, CONTRADICTED}
    assert all(one.figures == () for one in found.facts)
    assert sum(found.counts.values()) == len(found.facts)
    assert REMARK not in found.counts


def test_every_verdict_has_its_sign_and_meaning() -> None:
    found = audit(*_of(every_kind() + Synthetic().grid()))
    assert set(found.counts) <= set(MEANINGS)
    signs = {name: sign for name, (sign, _) in MEANINGS.items()}
    assert signs["reproduced"] != signs["differs"] != signs["not measured here"]


def test_a_made_up_model_reproduces_nothing() -> None:
    found = audit(*_of(every_kind() + Synthetic().grid()))
    assert "reproduced" not in found.counts
    assert "differs" not in found.counts


def _of(records: list[Record]) -> tuple[list[Group], list[Record]]:
    return make_groups(make_rows(records)), records


def test_rows_give_their_verdicts_by_name() -> None:
    whole = evidence()
    found = {name: about(whole) for name, about in ABOUT.items()}
    qat = found["qat-best"]
    assert qat is not None
    assert qat.verdict == "holds here"
    assert "qat 3 bits g128" in qat.why
    pruned = found["prune-accuracy"]
    assert pruned is not None
    assert pruned.verdict == "cannot be decided here"
    attention = found["attention-before-mlp"]
    assert attention is not None
    assert attention.verdict == "does not hold here"
    edges = found["first-last-critical"]
    assert edges is not None
    assert edges.verdict == "holds in part here"
    assert found["nanogpt-speed"] is None
    assert found["qat-int8-below-1b"] is None


def test_a_nanogpt_of_another_size_reproduces_nothing() -> None:
    records = [
        r for r in Synthetic("nanogpt").grid() if r.config["method"] in ("fp32", "int8_dynamic")
    ]
    groups = make_groups(make_rows(records))
    found = ABOUT["nanogpt-ratio"](Evidence(tuple(groups), tuple(records)))
    assert found is not None
    assert found.verdict == DIFFERS
    assert "3,000,000 parameters" in found.why
    assert increase(groups[0], groups[0].rows[0]) == 0


def test_real_models_go_before_the_demonstration_model() -> None:
    claim = next(fact for fact in documents().facts if fact.id == "qat-best")
    real = every_kind()
    shown = [replace(one, details={**one.details, "model": {"kind": "embedded"}}) for one in real]

    def found(records: list[Record]) -> Verdict:
        return verdict(claim, Evidence(tuple(make_groups(make_rows(records))), tuple(records)))

    assert found(real).verdict == "holds here"
    assert found(shown).verdict == "cannot be decided here"
    assert "demonstration model" in found(shown).why


def test_a_speed_without_a_named_processor_is_never_reproduced() -> None:
    made = Synthetic("nanogpt").grid()
    shown = [
        changed(
            replace(
                r, details={**r.details, "model": {"kind": "nanogpt", "parameters": 10_745_088}}
            ),
            "decode_speedup",
            value=1.46,
        )
        for r in made
        if r.config["method"] in ("fp32", "int8_dynamic")
    ]
    found = ABOUT["nanogpt-speed"](Evidence(tuple(make_groups(make_rows(shown))), tuple(shown)))
    assert found is not None
    assert found.verdict == "cannot be decided here"
    assert "names no processor" in found.why
