"""What is compared with the baseline, and what the report says of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from harness.record import Record, Value
from reports import stats, verdicts
from reports.findings import findings, warnings
from reports.gather import make_groups, make_rows
from reports.rows import Group, Row
from reports.summary import Cell, detail_table, summary_table
from reports.verdicts import Judgement, judge
from tests.reports.synthetic import (
    PERPLEXITY,
    Synthetic,
    changed,
    score_of,
    task_facts,
    with_tasks,
)


def group_of(*records: Record) -> Group:
    (group,) = make_groups(make_rows(list(records)))
    return group


def cell(method: str, bits: float = 32, *values: Value) -> Record:
    record = Synthetic().cell(method, bits, None, "packed", "k")
    return replace(record, values=values) if values else record


def answers(right: str, protocol: str = "quiz_0shot") -> Value:
    return score_of(protocol, "acc", tuple(float(c == "1") for c in right))


def losses(values: list[float], metric: str = "perplexity") -> Value:
    figure = math.exp(sum(values) / len(values))
    return Value("perplexity", metric, PERPLEXITY, figure, "perplexity", False, None, tuple(values))


def only(group: Group) -> Judgement:
    (found,) = judge(group).found.values()
    return found


def row_of(group: Group, method: str) -> Row:
    return next(row for row in group.rows if row.method == method)


TEXT = [4 + 0.5 * math.sin(7 * i) for i in range(24)]


def test_flips_are_counted_and_the_rule_applied() -> None:
    right = "1" * 80 + "0" * 20
    worse = "1" * 50 + "0" * 48 + "11"
    found = only(group_of(cell("fp32", 32, answers(right)), cell("rtn", 2, answers(worse))))
    assert (found.comparison.lost, found.comparison.gained) == (30, 2)
    assert found.comparison.difference == pytest.approx(-0.28)
    assert (found.verdict, found.acceptance, found.tone) == ("worse", "unacceptable", "worse")
    assert found.text == "worse, unacceptable"
    assert found.write(found.comparison.difference) == "-28.0 points"


def test_a_small_steady_loss_of_perplexity_is_worse_and_acceptable() -> None:
    noise = [0.002 * math.cos(3 * i) for i in range(24)]
    rows = [loss + 0.01 + extra for loss, extra in zip(TEXT, noise, strict=True)]
    found = only(group_of(cell("fp32", 32, losses(TEXT)), cell("rtn", 4, losses(rows))))
    assert (found.verdict, found.acceptance) == ("worse", "acceptable")
    assert found.write(found.comparison.difference) == "+1.0 %"
    assert found.text == "worse, acceptable"


def test_equal_windows_are_identical_and_equal_answers_are_no_proof() -> None:
    found = only(group_of(cell("fp32", 32, losses(TEXT)), cell("bf16", 16, losses(TEXT))))
    assert found.text == "identical, acceptable"
    few = answers("1100110011")
    found = only(group_of(cell("fp32", 32, few), cell("bf16", 16, few)))
    assert (found.text, found.tone) == ("same answers", "open")


def test_a_divergence_from_the_model_itself_only_differs() -> None:
    def kl(samples: tuple[float, ...]) -> Value:
        mean = sum(samples) / len(samples)
        return Value("divergence", "kl_mean", PERPLEXITY, mean, "nats", False, None, samples)

    moved = tuple(0.001 + 0.0001 * math.sin(i) for i in range(16))
    found = only(group_of(cell("fp32", 32, kl((0.0,) * 16)), cell("rtn", 4, kl(moved))))
    assert found.verdict == "worse"
    assert (found.text, found.tone, found.acceptance) == ("differs", "moved", None)
    assert found.write(0.001) == "+0.00100"
    noisy = tuple(0.0001 + 0.00001 * math.cos(i) for i in range(16))
    found = only(group_of(cell("fp32", 32, kl(noisy)), cell("rtn", 4, kl(moved))))
    assert found.text == "worse"


def test_p_values_are_corrected_over_the_rows_of_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def holm(ps: list[float]) -> list[float]:
        asked.append(len(ps))
        return [min(1.0, 10 * p) for p in ps]

    monkeypatch.setattr(stats, "holm", holm)
    base = "1" * 40 + "0" * 60
    records = [cell("fp32", 32, answers(base), losses(TEXT))]
    for bits in (4, 3, 2):
        scores = answers("1" * 36 + "0" * 64)
        records.append(cell("rtn", bits, scores, *([losses(TEXT)] if bits > 2 else [])))
    group = group_of(*records)
    found = judge(group)
    assert sorted(asked) == [2, 3]
    one = found.of("acc", "quiz_0shot")[0]
    assert one.p_holm == pytest.approx(min(1.0, 10 * one.comparison.p))
    assert judge(group) is found


def test_what_is_no_pair_is_not_compared_and_says_why() -> None:
    base = cell("fp32", 32, answers("10" * 10), losses(TEXT))
    short = cell("rtn", 4, answers("10" * 9), losses(TEXT))
    odd = cell("rtn", 3, answers("10" * 10), replace(losses(TEXT), value=1.0))
    bare = cell("rtn", 2, replace(answers("10" * 10), samples=()), losses(TEXT))
    found = judge(group_of(base, short, odd, bare))
    assert set(found.uncompared.values()) == {
        "18 samples and 20 are no pairs",
        "it is no mean of its samples",
    }
    assert [one.row.bits for one in found.of("acc", "quiz_0shot")] == [3]


def test_other_questions_are_not_compared_and_old_records_are() -> None:
    def asked(record: Record, digest: str | None) -> Record:
        facts = {"quiz": {"questions": digest, "group": None}}
        return replace(record, details={**record.details, "tasks": facts})

    base, row = cell("fp32", 32, answers("10" * 10)), cell("rtn", 4, answers("10" * 10))
    found = judge(group_of(asked(base, "a"), asked(row, "b")))
    assert list(found.uncompared.values()) == ["the questions are not the same"]
    for pair in ((asked(base, "a"), asked(row, "a")), (asked(base, "a"), row), (base, row)):
        assert judge(group_of(*pair)).found


def test_lambadas_perplexity_is_its_own_figure() -> None:
    record = with_tasks(cell("fp32"))
    worse = with_tasks(cell("rtn", 4), 0.6)
    group = group_of(record, worse)
    found = judge(group).get(row_of(group, "rtn"), "perplexity", "lambada_openai_0shot")
    assert found is not None
    assert found.scale == "negative_log"
    assert found.verdict == "worse"
    assert found.write(found.comparison.difference).endswith("%")
    (column,) = [c for c in summary_table(group).columns if c.metric == "perplexity"]
    assert column.protocol == PERPLEXITY
    quality = detail_table(group, {"perplexity"})
    assert {c.protocol for c in quality.columns} == {PERPLEXITY}


def test_broken_figures_are_worse_whatever_the_samples() -> None:
    broken = replace(losses(TEXT), value=math.inf, samples=(math.inf, *TEXT[1:]))
    found = only(group_of(cell("fp32", 32, losses(TEXT)), cell("rtn", 2, broken)))
    assert (found.verdict, found.acceptance) == ("worse", "unacceptable")
    assert found.write(found.comparison.difference) == "–"


def test_a_score_at_chance_says_nothing() -> None:
    def known(record: Record) -> Record:
        facts = {"quiz": {**task_facts("quiz", 100), "chance": 0.25}}
        return replace(record, details={**record.details, "tasks": facts})

    base = known(cell("fp32", 32, answers("1" * 28 + "0" * 72)))
    worse = known(cell("rtn", 2, answers("1" * 5 + "0" * 95)))
    group = group_of(base, worse)
    assert only(group).text == "baseline at chance"
    said = "quiz acc (28.0 %) is not above that of random answers (25.0 %)"
    assert any(said in warning for warning in warnings(group))
    assert not [f for f in findings(group) if "ccept" in f.question]
    clear = group_of(known(cell("fp32", 32, answers("1" * 60 + "0" * 40))), worse)
    assert only(clear).text == "worse, unacceptable"


def test_a_loss_that_correction_takes_away_condemns_no_row() -> None:
    base = answers("1" * 60 + "0" * 40)
    hit = answers("1" * 52 + "0" * 48)
    alone = only(group_of(cell("fp32", 32, base), cell("rtn", 2, hit)))
    assert (alone.verdict, alone.acceptance) == ("worse", "unacceptable")
    many = [cell("rtn", bits, hit) for bits in (8, 7, 6, 5, 4, 3, 2)]
    found = judge(group_of(cell("fp32", 32, base), *many)).of("acc", "quiz_0shot")
    assert {(one.verdict, one.acceptance) for one in found} == {
        ("not distinguishable", "not decided"),
    }


def test_the_verdict_stands_beside_the_figure_and_quality_is_not_crowned(
    grid: list[Record],
) -> None:
    table = summary_table(group_of(*grid))
    cells: dict[str, dict[str, Cell]] = {
        column.metric: {
            row.label: found for row, found in zip(table.rows, column.cells, strict=True)
        }
        for column in table.columns
    }
    assert cells["perplexity"]["rtn 2 bits g128"].verdict == "worse, unacceptable"
    assert cells["perplexity"]["rtn 8 bits g128"].verdict == "equivalent (<\u00a03\u00a0%)"
    assert cells["perplexity"]["fp32"].verdict == ""
    assert cells["artefact_bytes"]["rtn 2 bits g128"].verdict == ""
    assert not any(found.mark for found in cells["perplexity"].values())
    assert not any(found.mark for found in cells["acc"].values())


def test_findings_say_what_is_acceptable(grid: list[Record]) -> None:
    texts = [replace(r, values=tuple(v for v in r.values if v.measure != "tasks")) for r in grid]
    found = {f.question: f for f in findings(group_of(*texts))}
    good = found["Acceptable (loss below 3 %)"]
    assert good.answer.startswith("bf16, fp16, int8_dynamic")
    assert "4 bits" not in good.answer
    assert PERPLEXITY in good.rule
    assert "rtn 2 bits g128" in found["Not acceptable (loss above 5 %)"].answer
    # The tasks' hundred questions decide less than the text.
    found = {f.question: f for f in findings(group_of(*grid))}
    undecided = found["Acceptable or not: cannot be decided"].answer
    assert "int8_static (endings acc and facts acc)" in undecided
    assert "Acceptable (loss below 3 %)" not in found


def test_nothing_is_said_without_samples_or_a_baseline(grid: list[Record]) -> None:
    assert judge(group_of(*grid[1:])).found == {}
    bare = [changed(changed(r, "perplexity", samples=()), "acc", samples=()) for r in grid]
    group = group_of(*bare)
    assert {key[1] for key in judge(group).found} == {"kl_mean"}
    assert not [f for f in findings(group) if "ccept" in f.question]


def test_each_figure_of_quality_has_its_scale() -> None:
    score = answers("10")
    assert verdicts.scale_of(score) == "linear"
    assert verdicts.scale_of(replace(score, unit="score")) == "linear"
    assert verdicts.scale_of(replace(score, unit="perplexity")) == "negative_log"
    assert verdicts.scale_of(losses(TEXT)) == "log"
    assert verdicts.scale_of(replace(losses(TEXT), measure="speed", metric="x_seconds")) is None
