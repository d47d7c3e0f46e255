from __future__ import annotations

from dataclasses import replace

from harness.record import Failure
from reports.calibration import calibration_blocks, spreads
from reports.gather import make_groups, make_rows
from reports.jobs import deploy_blocks, job_rows, search_blocks
from tests.reports.advanced import (
    calibrated,
    deploy_record,
    job_record,
    search_record,
    with_kl,
)
from tests.reports.synthetic import Synthetic


def test_a_deployment_lists_its_checks_in_words() -> None:
    (block,) = deploy_blocks([deploy_record(False)])
    assert block.sentences[0].startswith("DID NOT PASS: rtn 4 bits g128 (2 PASS, 1 FAIL, 1 no lim")
    results = {line[0].text: [field.text for field in line[1:4]] for line in block.grids[0].lines}
    assert results["perplexity increase"] == ["FAIL", "+3.0 %", "+31.0 %"]
    assert results["size"] == ["PASS", "10.0 MB", "1.90 MB"]
    assert results["time per token"] == ["no limit", "no limit", "4.20 ms"]
    (passed,) = deploy_blocks([deploy_record()])
    assert passed.sentences[0].startswith("PASSED")


def test_a_search_tells_who_was_dropped_and_what_was_saved() -> None:
    (block,) = search_blocks([search_record()], {})
    assert block.sentences[0].startswith("Chosen: rtn 8 bits g128")
    assert "8 (17 %) saved" in block.sentences[1]
    candidates, rungs = block.grids
    assert [line[0].text for line in candidates.lines] == [
        *("rtn 4 bits g64", "rtn 8 bits g128, chosen", "rtn 8 bits g64"),
    ]
    assert candidates.lines[2][2].text == "not measured"
    assert rungs.lines[0][3].text == "rtn 4 bits g64: its interval lies above the limit"
    (none,) = search_blocks([search_record(None)], {})
    assert none.sentences[0].startswith("Nothing was chosen")


def test_jobs_are_no_rows_but_their_commands_and_failures_are_shown() -> None:
    failed = replace(
        deploy_record(), cell="f", status="failed", errors=(Failure("deploy", "config", "no"),)
    )
    rung = job_record("rung", {})
    records = [deploy_record(), failed, rung, *Synthetic().grid()[:1]]
    assert [row.label for row in make_rows(records)] == ["fp32"]
    assert [row.label for row in job_rows(records)] == ["deploy rtn 4 bits g128"] * 2


def test_calibrations_that_differ_alone_are_compared() -> None:
    rows = [
        with_kl(calibrated("mse", samples, text), 1e6, kl)
        for samples, text, kl in (
            (128, "world", 0.01),
            (512, "world", 0.011),
            (128, "code", 0.05),
            (512, "code", 0.05),
        )
    ]
    (group,) = make_groups(make_rows([Synthetic().grid()[0], *rows]))
    labels = [row.label for row in group.rows[1:]]
    assert labels == [
        "int8_static (calibration=code, samples=128)",
        "int8_static (calibration=code, samples=512)",
        "int8_static (calibration=world, samples=128)",
        "int8_static (calibration=world, samples=512)",
    ]
    (block,) = calibration_blocks(group)
    (grid,) = block.grids
    assert [[f.text for f in line[:3]] for line in grid.lines][:2] == [
        ["mse", "code", "128 of 128"],
        ["mse", "code", "512 of 128"],
    ]
    ((by_text, by_count),) = spreads(group)
    assert by_text is not None
    assert round(by_text, 2) == 5.0
    assert by_count is not None
    assert round(by_count, 2) == 1.1


def test_rows_that_need_three_options_are_told_apart_in_few_words() -> None:
    rows = [
        calibrated(observer, samples, text)
        for observer in ("minmax", "mse")
        for samples in (128, 512)
        for text in ("world", "code")
    ]
    labels = [row.label for row in make_rows(rows)]
    assert len(set(labels)) == 8
    assert "int8_static (world, 512 samples, mse)" in labels


def test_one_calibration_is_no_comparison() -> None:
    (group,) = make_groups(make_rows([calibrated("mse", 128, "world")]))
    assert calibration_blocks(group) == []
