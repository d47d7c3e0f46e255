from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.record import Record
from reports import sections
from reports.gather import make_groups, make_rows
from reports.rows import Group
from tests.reports.synthetic import QUANTIZED, environment, partial, simulated, with_random_weights


def group_of(records: list[Record]) -> Group:
    (group,) = make_groups(make_rows(records))
    return group


def with_details(record: Record, **changes: Any) -> Record:
    return replace(record, details={**record.details, **changes})


def test_rows_with_equal_kernels_share_a_line(grid: list[Record]) -> None:
    lines = sections.kernel_lines(group_of(grid))
    assert lines[0].labels == ("fp32", "bf16")
    assert (lines[0].kernel, lines[0].matrices, lines[0].share) == ("torch.linear", 42, "100.0 %")
    kernel = grid[7].details["kernels"][0]
    mixed = [{**kernel, "weights": QUANTIZED}, {**kernel, "kernel": "b", "weights": 3 * QUANTIZED}]
    lines = sections.kernel_lines(group_of([with_details(grid[7], kernels=mixed)]))
    assert [(line.kernel, line.share) for line in lines] == [
        ("b", "75.0 %"),
        ("rtn int4", "25.0 %"),
    ]


def test_coverage_tells_what_was_left_out_and_why(grid: list[Record]) -> None:
    (found,) = sections.coverages(group_of(grid))
    assert found.labels == ("all rows",)
    assert (found.share, found.quantized, found.total) == ("78.6 %", "2,359,296", "3,000,000")
    assert found.left_out == (
        ("an embedding", "524,288", "model.embed_tokens.weight"),
        ("a vector", "1,536", "model.layers.*.input_layernorm.weight (6×)"),
    )


def test_generated_texts_stand_beside_the_unquantized_models(grid: list[Record]) -> None:
    right = {**grid[0].details["generation"][0], "text": " Lima and sells 12 apples a day."}
    (prompt,) = sections.prompts(group_of([with_details(grid[0], generation=[right]), *grid[1:3]]))
    assert prompt.reference == " Lima and sells 12 apples a day."
    assert [text.labels for text in prompt.continuations] == [("fp32",), ("bf16", "fp16")]
    assert prompt.continuations[0].differs == ""
    assert prompt.continuations[1].same == " Lima and sells 12 "
    assert prompt.continuations[1].differs == "pears a day."
    short = with_details(grid[0], generation=[{**right, "text": " Lima"}])
    (prompt,) = sections.prompts(group_of([short]))
    assert prompt.continuations[0].differs == "(ends here)"
    assert sections.prompts(group_of([with_random_weights(grid[0])])) == []


def test_one_machine_is_told_once_with_the_range_of_its_load(grid: list[Record]) -> None:
    records = [replace(grid[0], environment=environment(load_average=1.25)), *grid[1:]]
    (machine,) = sections.machines(make_rows(records))
    facts = dict(machine.facts)
    assert facts["memory"] == "16.0 GB"
    assert facts["torch"] == "2.13.0"
    assert facts["load average"] == "0.40 to 1.25 when the cells began"
    assert "gpu" not in facts


def test_other_machines_and_versions_are_told_apart(grid: list[Record]) -> None:
    other = replace(grid[0], environment=environment(cpu="Another CPU"))
    found = sections.machines(make_rows([other, *grid[1:]]))
    assert len(found) == 2
    assert not sections.same_machine(found)
    version = replace(grid[0], environment=environment(packages={"torch": "2.14.0"}))
    found = sections.machines(make_rows([version, *grid[1:]]))
    assert len(found) == 2
    assert sections.same_machine(found)


def test_what_was_not_measured_is_said_with_its_reason(grid: list[Record]) -> None:
    short = replace(grid[5], values=tuple(v for v in grid[5].values if v.measure != "tasks"))
    records = [grid[0], grid[1], short, partial(grid[9]), simulated(grid[11])]
    said = {text.labels: text.text for text in sections.missing(group_of(records))}
    assert said[("rtn 8 bits g32",)] == "tasks: not measured (suite smoke)"
    assert said[("rtn 3 bits g32",)].startswith("tasks: the measure failed")
    assert said[("rtn 2 bits g32",)].startswith("size, memory, speed: the row is simulated")


def test_notes_and_what_speed_left_out_are_shown_once(grid: list[Record]) -> None:
    speed = {"left_out": ["prompt128_depth256_batch64: its cache would not fit"]}
    found = sections.notes(group_of([grid[0], with_details(grid[1], speed=speed)]))
    assert [(said.labels, said.text) for said in found] == [
        (("fp32", "fp16"), "a synthetic record: nothing was measured"),
        (("fp16",), "speed left out, prompt128_depth256_batch64: its cache would not fit"),
    ]


def test_calibration_and_model_are_shown(grid: list[Record]) -> None:
    calibrated = with_details(grid[4], calibration={"source": "synthetic", "samples": 16})
    (said,) = sections.calibrations(group_of([grid[0], calibrated]))
    assert (said.labels, said.text) == (("int8_static",), "source synthetic, samples 16")
    (said,) = sections.models(group_of(grid))
    assert "parameters 3,000,000" in said.text


def test_the_embedded_model_is_known_by_its_kind(grid: list[Record]) -> None:
    renamed = [replace(r, config={**r.config, "model": "mine"}) for r in grid]
    assert not sections.is_embedded(group_of(renamed))
    kind = [with_details(record, model={"kind": "embedded"}) for record in renamed]
    assert sections.is_embedded(group_of(kind))


def test_details_of_any_shape_are_survived() -> None:
    strange: list[Any] = [None, 3, "text", [], [1], {"a": None}, [["x"]], {"points": "no"}]
    records = [
        Record(
            cell=f"c{index}",
            status="ok",
            config={"model": "m", "method": f"m{index}"},
            details=dict.fromkeys(
                ("kernels", "coverage", "generation", "notes", "calibration", "model", "speed"),
                found,
            ),
        )
        for index, found in enumerate(strange)
    ]
    group = group_of(records)
    assert sections.kernel_lines(group) is not None
    assert sections.coverages(group) == []
    assert isinstance(sections.prompts(group), list)
    assert isinstance(sections.notes(group), list)
    assert sections.calibrations(group) is not None
    assert sections.machines(group.rows) == []
