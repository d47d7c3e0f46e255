"""The checks of a deployment, from records made here and as a command."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.deploy import Check, DeployJob, checks_of
from harness.record import Failure, Record, Value
from kernels.errors import ConfigError
from reports.outcomes import outcome_text, succeeded
from tests.test_run import quantbench, records

TINY = [
    "suite.measures.perplexity.windows=3",
    "suite.measures.speed.decode_tokens=4",
    "suite.measures.speed.repeats=1",
    "suite.measures.speed.prompt_lengths=[16]",
    "suite.measures.memory.depth=16",
]
BASELINE = (1.0, 1.2, 1.1, 0.9)


def value(metric: str, found: float, measure: str = "speed", **more: Any) -> Value:
    return Value(measure, metric, "p_gptq_8", found, "", None, **more)


def measured(shift: float = 0.01, **changes: Any) -> Record:
    values = (
        value("perplexity", 2.9, samples=tuple(loss + shift for loss in BASELINE)),
        value("non_finite_logits", 0.0, "functional"),
        value("repeated_tokens_equal", 1.0, "functional"),
        value("path_difference_decode", 1e-6, "paths"),
        value("artefact_bytes", 2e6),
        value("peak_memory_bytes", 5e7),
        value("ttft_seconds", 0.2),
        value("tpot_seconds", 0.01),
        value("decode_tokens_per_second", 100.0),
    )
    record = Record("cell", "ok", {}, values, details={"paths": {"tolerance": 1e-3}})
    return replace(record, **changes)


def verdicts(record: Record, **limits: float) -> dict[str, bool | None]:
    checks = checks_of(record, measured(shift=0.0), {"max_increase": 0.03, **limits})
    return {check.name: check.passed for check in checks}


def without(record: Record, metric: str) -> Record:
    return replace(record, values=tuple(v for v in record.values if v.metric != metric))


def test_a_sound_artefact_passes_and_gates_without_a_limit_are_only_shown() -> None:
    found = verdicts(measured())
    assert found["perplexity above the baseline"] is True
    assert found["quantized and loaded again"] is True
    assert found["packed against dequantized logits"] is True
    assert found["peak memory"] is None
    assert False not in found.values()


@pytest.mark.parametrize(
    ("limits", "name", "kept"),
    [
        ({"max_increase": 0.005}, "perplexity above the baseline", False),
        ({"max_memory": 6e7}, "peak memory", True),
        ({"max_memory": 4e7}, "peak memory", False),
        ({"max_size": 1e6}, "artefact", False),
        ({"max_ttft": 0.3}, "ttft", True),
        ({"max_tpot": 0.005}, "tpot", False),
        ({"min_decode_tokens_per_second": 50.0}, "decode tokens per second", True),
        ({"min_decode_tokens_per_second": 200.0}, "decode tokens per second", False),
    ],
)
def test_limits_hold_in_their_direction(limits: dict[str, float], name: str, kept: bool) -> None:
    assert verdicts(measured(), **limits)[name] is kept


def test_a_limit_that_could_not_be_checked_is_not_kept() -> None:
    record = without(measured(), "peak_memory_bytes")
    record.details["notes"] = ["memory not measured: the engine cannot give it"]
    checks = checks_of(record, measured(shift=0.0), {"max_increase": 0.03, "max_memory": 1e9})
    (memory,) = [check for check in checks if check.name == "peak memory"]
    assert memory == Check("peak memory", 1e9, None, "B", False, record.details["notes"][0])
    assert verdicts(without(measured(), "perplexity"))["perplexity above the baseline"] is False


def test_broken_logits_texts_and_kernels_fail() -> None:
    broken = measured()
    changed = tuple(
        replace(
            v, value={"non_finite_logits": 3.0, "repeated_tokens_equal": 0.5}.get(v.metric, 1.0)
        )
        if v.measure in ("functional", "paths")
        else v
        for v in broken.values
    )
    found = verdicts(replace(broken, values=changed))
    assert found["logits that are not finite"] is False
    assert found["greedy text equal when written again"] is False
    assert found["packed against dequantized logits"] is False


def test_a_cell_that_failed_says_why() -> None:
    record = Record("cell", "failed", {}, errors=(Failure("quantize", "memory", "out of memory"),))
    checks = checks_of(record, measured(shift=0.0), {"max_increase": 0.03})
    assert checks[0].passed is False
    assert checks[0].why == "out of memory"
    assert checks[4].why == "out of memory"


def test_options_are_read_before_anything_runs() -> None:
    given = DeployJob("deploy", max_increase="5%", max_memory="8GB", max_tpot="20ms").limits()
    assert given == pytest.approx({"max_increase": 0.05, "max_memory": 8e9, "max_tpot": 0.02})
    with pytest.raises(ConfigError, match=r"job\.max_memory is '8 cows'"):
        DeployJob("deploy", max_memory="8 cows").limits()
    with pytest.raises(ConfigError, match=r"job\.max_increase is null"):
        DeployJob("deploy", max_increase=None).limits()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("deployed") / "runs"
    done = quantbench("job=deploy", "profile=mobile_device", *TINY, f"runs_dir={runs}")
    assert done.code == 0, done.err
    assert "deployment of profile mobile_device" in done.out
    assert "passed; artefact: cache/artefacts/" in done.out
    return runs


def test_a_profile_is_deployed_as_a_row_and_a_record_of_its_own(deployed: Path) -> None:
    found = records(deployed)
    (record,) = [r for r in found.values() if r.config["job"] == "deploy"]
    details = record.details["deploy"]
    row = found[details["cell"]]
    assert (row.config["job"], row.config["bits"], row.config["group_size"]) == ("cell", 4, 64)
    assert "job=deploy" not in row.config["command"]
    assert succeeded(record)
    assert (deployed / details["artefact"] / "model.safetensors").is_file()
    for check in details["checks"]:
        assert check["name"] in outcome_text(record)


def test_a_limit_that_is_not_kept_is_exit_status_1_and_nothing_is_measured_again(
    deployed: Path,
) -> None:
    done = quantbench(
        "job=deploy", "profile=mobile_device", "job.max_size=1kB", *TINY, f"runs_dir={deployed}"
    )
    assert done.code == 1
    assert re.search("FAIL +artefact", done.out)
    assert "not passed: artefact" in done.out
    assert ": ok (" not in done.out, "the cell of the first deployment is there"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["job.max_increase=three"], "job.max_increase is 'three'"),
        (["job.max_memory=8gb"], "job.max_memory is '8gb'"),
        (["profile=nvidia_a100"], "sees no CUDA card"),
        (["profile=laptop"], "Could not find 'profile/laptop'"),
        (["-m", "profile=mobile_device,arm_mobile"], "run it without -m"),
    ],
)
def test_what_cannot_be_deployed_is_one_sentence(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    if "nvidia" in arguments[0] and Path("/proc/driver/nvidia/gpus").exists():
        pytest.skip("there is a card here")
    done = quantbench(*arguments, "job=deploy", f"runs_dir={tmp_path / 'runs'}")
    assert done.code not in (0, 1) or "Could not find" in done.err
    assert sentence in done.err
    assert "Traceback" not in done.err
