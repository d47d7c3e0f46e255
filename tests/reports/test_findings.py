from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from harness.record import Record
from reports.findings import findings, warnings
from reports.gather import make_groups, make_rows
from reports.pareto import pareto, plane
from reports.rows import Group
from tests.reports.synthetic import PERPLEXITY, SPEED, changed, with_random_weights


def group_of(records: list[Record]) -> Group:
    (group,) = make_groups(make_rows(records))
    return group


def answers(records: list[Record]) -> dict[str, str]:
    return {found.question: found.answer for found in findings(group_of(records))}


def test_pareto_front_of_a_known_set() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (3.0, 6.0), (4.0, 5.0), (5.0, 1.0), (1.0, 9.0)]
    assert pareto(points) == [True, True, False, False, True, True]


numbers = st.floats(0.1, 1e6)


@given(st.lists(st.tuples(numbers, numbers), max_size=12))
def test_pareto_is_what_its_definition_says(points: list[tuple[float, float]]) -> None:
    wanted = [not any(a <= x and b <= y and (a < x or b < y) for a, b in points) for x, y in points]
    assert pareto(points) == wanted


def test_the_smallest_within_a_margin_is_found(grid: list[Record]) -> None:
    # 8 bits: +0.15 %; 4 bits: above 30 %. Group sizes make 8 bits per tensor the smallest.
    found = answers(grid)["Smallest within 1 % of the baseline's perplexity"]
    assert found.startswith("int8_")
    assert "(×0.41)" in found
    near = changed(grid[7], "perplexity", value=6.1 * 1.02)
    found = answers([*grid[:7], near, *grid[8:]])
    assert found["Smallest within 3 % of the baseline's perplexity"].startswith("rtn 4 bits g32")
    assert found["Smallest within 1 % of the baseline's perplexity"].startswith("int8_")


def test_no_row_within_a_margin_is_said(grid: list[Record]) -> None:
    found = answers([grid[0], grid[12]])
    assert found["Smallest within 1 % of the baseline's perplexity"] == "no row but the baseline"


def test_without_a_baseline_nothing_is_measured_against_it(grid: list[Record]) -> None:
    found = answers(grid[1:])
    assert not any(question.startswith("Smallest") for question in found)
    assert any("baseline of this group was not measured" in w for w in warnings(group_of(grid[1:])))


def test_the_fastest_row_and_its_ratio(grid: list[Record]) -> None:
    fast = changed(
        changed(grid[3], "decode_tokens_per_second", value=900.0), "decode_speedup", value=4.9
    )
    found = answers([*grid[:3], fast, *grid[4:]])["Fastest decode"]
    assert found == "int8_dynamic, 900 tokens/s, ×4.90 the baseline timed in turns with it"
    slow = [changed(record, "decode_tokens_per_second", value=1.0) for record in grid[1:]]
    assert answers([grid[0], *slow])["Fastest decode"].endswith("the baseline itself")


def test_rows_slower_than_the_baseline_are_counted(grid: list[Record]) -> None:
    found = answers(grid)["Decode slower than the baseline"]
    assert found.startswith("1 of 12 rows (fp16)")
    assert "converted at each call" in found
    even = [changed(record, "decode_speedup", value=1.2) for record in grid]
    assert answers(even)["Decode slower than the baseline"] == "0 of 12 rows"


def test_broken_rows_are_named(grid: list[Record]) -> None:
    nan = changed(grid[3], "perplexity", value=math.nan)
    found = answers([*grid[:3], nan, *grid[4:]])["Perplexity more than doubles in"]
    assert found.startswith("int8_dynamic, rtn 3 bits g32")


def test_every_finding_has_its_rule_and_protocol(grid: list[Record]) -> None:
    for found in findings(group_of(grid)):
        assert PERPLEXITY in found.rule or SPEED in found.rule


def test_random_weights_leave_no_finding_on_quality(grid: list[Record]) -> None:
    found = answers([with_random_weights(record) for record in grid])
    assert set(found) == {"Fastest decode", "Decode slower than the baseline"}


def test_a_plane_holds_rows_with_both_figures_and_names_what_it_cannot_draw(
    grid: list[Record],
) -> None:
    infinite = changed(grid[12], "perplexity", value=math.inf)
    drawn = plane(group_of([*grid[:12], infinite]), "artefact_bytes")
    assert drawn is not None
    assert len(drawn.points) == 12
    assert drawn.left_out == ("rtn 2 bits g128 (perplexity infinite)",)
    assert not drawn.higher_is_better
    assert plane(group_of(grid[:1]), "artefact_bytes") is None
    assert plane(group_of(grid), "no_such_metric") is None


def test_the_front_against_speed_prefers_fast_rows(grid: list[Record]) -> None:
    records = [
        changed(changed(grid[0], "perplexity", value=6.0), "decode_tokens_per_second", value=100.0),
        changed(changed(grid[3], "perplexity", value=7.0), "decode_tokens_per_second", value=200.0),
        changed(changed(grid[4], "perplexity", value=8.0), "decode_tokens_per_second", value=150.0),
    ]
    drawn = plane(group_of(records), "decode_tokens_per_second")
    assert drawn is not None
    best = {point.row.label: point.best for point in drawn.points}
    assert best == {"fp32": True, "int8_dynamic": True, "int8_static": False}


def test_fewer_bits_that_look_better_are_pointed_out(grid: list[Record]) -> None:
    assert not any("fewer bits" in warning for warning in warnings(group_of(grid)))
    better = changed(grid[9], "perplexity", value=6.2)
    found = warnings(group_of([*grid[:9], better, *grid[10:]]))
    assert any(w.startswith("rtn 3 bits g32 has a lower perplexity than rtn 4") for w in found)


def test_noise_is_pointed_out(grid: list[Record]) -> None:
    found = " ".join(warnings(group_of(grid)))
    assert "Timing of int8_static was noisy" in found
    quiet = changed(grid[1], "kl_mean", value=1e-8)
    found = " ".join(warnings(group_of([grid[0], quiet])))
    assert "divergence of fp16 is not above the noise floor" in found
    broken = changed(grid[1], "nonfinite_logits", value=3.0)
    found = " ".join(warnings(group_of([grid[0], broken])))
    assert "not finite were counted in fp16" in found


def test_an_unsteady_machine_and_weights_in_caches_are_pointed_out(grid: list[Record]) -> None:
    point = {"last_burst_over_first": 1.4, "weights_fit_into_caches": True}
    records = [
        replace(record, details={**record.details, "speed": {"points": [point]}})
        for record in grid[:2]
    ]
    found = " ".join(warnings(group_of([*records, grid[2]])))
    assert "of fp32 and fp16 changed by more than 10 %" in found
    failed = replace(records[1], status="failed")
    quiet = grid[2]
    found = " ".join(warnings(group_of([records[0], failed, quiet])))
    assert "every row" not in found
    found = " ".join(warnings(group_of(records)))
    assert "The time per token of every row changed" in found
    assert "weights of every row fit into the processor's caches" in found


def test_rows_that_decode_otherwise_than_the_baseline_are_named(grid: list[Record]) -> None:
    def decoding(record: Record, own: str) -> Record:
        told = {"decoding": own, "baseline_decoding": "one C call a token"}
        return replace(record, details={**record.details, "speed": told})

    alike = [decoding(record, "one C call a token") for record in grid]
    said = "do not decode in the same way"
    assert not any(said in warning for warning in warnings(group_of(alike)))
    eager = decoding(grid[5], "transformers eager: hooks")
    (warning,) = [w for w in warnings(group_of([*alike[:5], eager, *alike[6:]])) if said in w]
    (label,) = [row.label for row in make_rows([eager])]
    assert warning.startswith(f"{label} and the baseline")
