"""The tables of verdicts, the parts of groups of tasks, and the stability of a format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.record import Record
from reports.evidence import LEGEND, REPEATED, Evidence, evidence, legend, p_text
from reports.gather import make_groups, make_rows
from reports.page import make_page
from reports.parts import parts
from reports.render import markdown, write_pages
from reports.rows import Group
from reports.summary import FORMAT_STABILITY, MAX_TASKS_IN_SUMMARY, detail_table, summary_table
from reports.tasks import hierarchy
from tests.reports.synthetic import Synthetic, repetition, with_tasks


def group_of(*records: Record) -> Group:
    (group,) = make_groups(make_rows(list(records)))
    return group


@pytest.fixture
def suite() -> Group:
    made = Synthetic()
    records = [made.cell("fp32", 32, None, "packed", "k"), made.cell("rtn", 8, 32, "packed", "k")]
    records.append(made.cell("rtn", 2, 32, "packed", "k"))
    qualities = (1.0, 0.98, 0.5)
    return group_of(*(with_tasks(r, q) for r, q in zip(records, qualities, strict=True)))


def table_of(group: Group, title: str) -> Evidence:
    return next(found for found in evidence(group) if found.title == title)


def test_each_main_figure_has_a_table_with_all_that_was_computed(suite: Group) -> None:
    titles = [found.title for found in evidence(suite)]
    assert titles[:2] == ["Perplexity", "KL, mean"]
    assert {"hellaswag acc_norm", "gsm8k exact_match_strict", "humaneval pass@1"} <= {*titles}
    found = table_of(suite, "hellaswag acc_norm")
    assert (found.protocol, found.samples) == ("hellaswag_0shot", "200 questions")
    assert found.flips
    assert found.ruled
    good, bad = found.lines
    assert (good.label, bad.label) == ("rtn 8 bits g32", "rtn 2 bits g32")
    assert (bad.verdict, bad.rule, bad.p) == ("worse", "unacceptable", "< 0.0001")
    assert bad.difference.startswith("-")
    assert bad.difference.endswith(" points")
    assert bad.interval.count("points") == 1
    assert int(bad.lost) > int(bad.gained)
    assert bad.numbers[0] == pytest.approx(float(bad.difference.split()[0]) / 100, abs=6e-4)


def test_a_divergence_has_neither_flips_nor_the_rule(suite: Group) -> None:
    found = table_of(suite, "KL, mean")
    assert (found.flips, found.ruled) == (False, False)
    assert {line.rule for line in found.lines} == {"–"}


def test_what_the_samples_cannot_show_is_said_in_words(suite: Group) -> None:
    found = table_of(suite, "humaneval pass@1")
    assert found.limit.startswith("1 row is not told from the baseline: with 50 questions")
    assert found.limit.endswith("points cannot be seen.")
    assert found.counts.endswith("1 worse")
    assert table_of(suite, "Perplexity").limit == ""


def test_a_figure_that_is_no_pair_is_named(suite: Group) -> None:
    records = [row.record for row in suite.rows]
    values = tuple(
        replace(v, samples=v.samples[:-1]) if v.protocol == "hellaswag_0shot" else v
        for v in records[1].values
    )
    found = table_of(
        group_of(records[0], replace(records[1], values=values), records[2]), "hellaswag acc_norm"
    )
    assert [line.label for line in found.lines] == ["rtn 2 bits g32"]
    assert found.left_out[0].startswith("rtn 8 bits g32: ")


def test_p_values_are_written_with_two_digits() -> None:
    assert [p_text(p) for p in (1.0, 0.234, 0.0123, 0.00004)] == [
        *("1.00", "0.23", "0.012", "< 0.0001"),
    ]


def test_repetitions_are_explained_where_there_are_any(suite: Group) -> None:
    assert legend(suite) == LEGEND
    made = [repetition(Synthetic(seed=s).cell("rtn", 4, 32, "packed", "k"), s) for s in range(2)]
    assert legend(group_of(*made)) == (*LEGEND, REPEATED)


def test_parts_stand_in_a_table_of_their_own(suite: Group) -> None:
    (found,) = parts(suite)
    assert (found.group, found.metric) == ("mmlu", "acc, %")
    assert [part.name for part in found.parts] == ["anatomy", "law", "physics"]
    assert {part.questions for part in found.parts} == {"40"}
    assert found.labels == ("fp32", "rtn 8 bits g32", "rtn 2 bits g32")
    score, change = found.parts[0].cells[2]
    assert float(score) < float(found.parts[0].cells[0][0])
    assert float(change) == pytest.approx(float(score) - float(found.parts[0].cells[0][0]), abs=0.1)
    columns = {column.protocol for column in detail_table(suite, {"tasks"}).columns}
    assert {"mmlu_5shot", "mmlu_stem_5shot", "mmlu_other_5shot"} <= columns
    assert not {"mmlu_anatomy_5shot", "mmlu_law_5shot"} & columns


def test_the_summary_has_only_whole_tasks(suite: Group) -> None:
    shown = [c.protocol for c in summary_table(suite).columns if c.family == "tasks"]
    assert shown == [
        *("endings_0shot_limit100", "facts_5shot_limit100", "gsm8k_5shot", "hellaswag_0shot"),
        *("humaneval_0shot", "lambada_openai_0shot"),
    ]
    assert len(shown) == MAX_TASKS_IN_SUMMARY


def test_strict_minus_flexible_is_the_stability_of_the_format(suite: Group) -> None:
    columns = detail_table(suite, {"tasks"}).columns
    place = next(i for i, c in enumerate(columns) if c.metric == FORMAT_STABILITY)
    found, strict = columns[place], columns[place - 1]
    flexible = next(c for c in columns if c.metric == "exact_match_flexible")
    assert strict.metric == "exact_match_strict"
    assert (found.head, found.unit) == ("gsm8k strict minus flexible", "points")
    for stability, one, other in zip(found.cells, strict.cells, flexible.cells, strict=True):
        assert stability.value == pytest.approx(100 * ((one.value or 0) - (other.value or 0)))
    assert found.cells[0].text.startswith("-")


def test_groups_within_groups_know_their_top(suite: Group) -> None:
    tasks = hierarchy(suite.rows)
    assert tasks.top("mmlu_law") == "mmlu"
    assert tasks.is_part("mmlu_law")
    assert not tasks.is_part("mmlu_stem")
    assert not tasks.is_top("mmlu_stem")
    assert tasks.is_top("hellaswag")
    circle = replace(
        suite.rows[0].record, details={"tasks": {"a": {"group": "b"}, "b": {"group": "a"}}}
    )
    assert hierarchy(make_rows([circle])).top("a") in ("a", "b")


def test_both_pages_show_verdicts_and_parts(suite: Group, tmp_path: Path) -> None:
    records = [row.record for row in suite.rows]
    text = markdown(make_page(records))
    for wanted in ("### Verdicts", "| Rule of 3 and 5 % |", "**mmlu by part** (acc, %):"):
        assert wanted in text
    assert "mmlu_anatomy_5shot" not in text
    paths = write_pages(records, [], tmp_path / "report")
    page = paths.html.read_text()
    for wanted in (">Verdicts</h3>", "mmlu by part", "Rule of 3 and 5 %", "cannot be seen."):
        assert wanted in page
