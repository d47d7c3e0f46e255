from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from harness.record import Record, Value
from reports.findings import findings
from reports.gather import make_groups, make_rows
from reports.paired import Alike, compare, said
from reports.rows import Group
from tests.reports.synthetic import PERPLEXITY, Synthetic

WINDOWS = 40


def record(method: str, losses: np.ndarray, bits: float = 4, size: int | None = 128) -> Record:
    cell = Synthetic().cell(method, bits, size, "packed", "k")
    value = Value(
        "perplexity",
        "perplexity",
        PERPLEXITY,
        math.exp(losses.mean()),
        "ratio",
        False,
        samples=tuple(losses.tolist()),
    )
    return replace(cell, values=(value,))


def group_of(*records: Record) -> Group:
    (group,) = make_groups(make_rows(list(records)))
    return group


def hard_text() -> np.ndarray:
    """Losses that differ much from window to window, as those of a real text do."""
    return 4 + np.random.default_rng(1).normal(0, 0.5, WINDOWS)


def found(*records: Record) -> Alike:
    (comparison,) = compare(group_of(*records))
    return comparison


def test_a_small_difference_on_every_window_is_told_apart() -> None:
    # Unpaired it would drown: 0.01 against a deviation of 0.5.
    text = hard_text()
    comparison = found(record("rtn", text + 0.01), record("gptq", text))
    (difference,) = comparison.differences
    assert difference.told_apart
    assert math.isclose(difference.comparison.difference, math.expm1(-0.01))
    assert said(comparison) == "gptq < rtn"


def test_what_differs_by_chance_is_not_ranked() -> None:
    text, chance = hard_text(), np.random.default_rng(2)
    rows = [record(name, text + chance.normal(0, 0.02, WINDOWS)) for name in ("awq", "gptq", "rtn")]
    comparison = found(*rows)
    assert not any(difference.told_apart for difference in comparison.differences)
    assert said(comparison).endswith("cannot be told apart")


def test_braces_overlap_where_a_row_is_alike_to_both_sides() -> None:
    text, chance = hard_text(), np.random.default_rng(3)
    noise = chance.normal(0, 0.03, WINDOWS)
    rows = [record("a", text), record("b", text + 0.012 + noise), record("c", text + 0.02)]
    assert said(found(*rows)) == "{a, b}, {b, c}"


def test_groups_that_differ_and_pairs_across_a_group_are_said() -> None:
    text, chance = hard_text(), np.random.default_rng(4)
    same = [text, text + chance.normal(0, 0.01, WINDOWS)]
    far = [text + 0.2, text + 0.2 + chance.normal(0, 0.01, WINDOWS)]
    rows = [record(name, losses) for name, losses in zip("abcd", [*same, *far], strict=True)]
    ordered = said(found(*rows))
    assert ordered.count("<") == 1
    assert {ordered.partition(" < ")[0], ordered.partition(" < ")[2]} <= {
        *("{a, b}", "{b, a}", "{c, d}", "{d, c}"),
    }
    # b lies between, told apart from both; c is too uneven to be told from a.
    uneven = text + 0.012 + chance.normal(0, 0.5, WINDOWS)
    uneven += 0.012 - float((uneven - text).mean())
    rows = [record("a", text), record("b", text + 0.01), record("c", uneven)]
    assert said(found(*rows)) == "a < {b, c} (not told apart either: a and c)"


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    missed = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        losses = hard_text()
        one = record("a", losses)
        other = record("b", losses + random.normal(0, 0.1, WINDOWS))
        missed += found(one, other).differences[0].told_apart
    assert missed <= 9


def test_only_rows_of_equal_bits_group_and_windows_are_compared() -> None:
    text = hard_text()
    apart = group_of(
        record("rtn", text), record("gptq", text, bits=3), record("awq", text, size=32)
    )
    assert compare(apart) == []
    assert compare(group_of(record("rtn", text), record("gptq", text[:-1]))) == []
    assert compare(group_of(record("rtn", text[:4]), record("gptq", text[:4]))) == []
    broken = text.copy()
    broken[0] = math.inf
    assert compare(group_of(record("rtn", text), record("gptq", broken))) == []


def test_the_report_says_it() -> None:
    text = hard_text()
    group = group_of(record("rtn", text + 0.01), record("gptq", text))
    (finding,) = [f for f in findings(group) if f.question.startswith("Methods by perplexity")]
    assert finding.question.endswith("at 4 bits, groups of 128")
    assert finding.answer == "gptq < rtn"
    assert f"{WINDOWS} windows" in finding.rule
