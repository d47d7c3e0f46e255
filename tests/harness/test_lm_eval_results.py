"""`results.json`: strict JSON that lm-eval's own readers take, beside every record with tasks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.utils import make_table

from harness.lm_eval_results import FILE_NAME, document, write_results
from harness.measure import Progress
from harness.record import Failure, Record
from tests.harness.measures.surroundings import CPU

KEPT: dict[str, Any] = {
    "results": {
        "sums": {
            "name": "sums",
            "alias": "sums",
            "sample_len": 4,
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.25,
        },
        "pages": {
            "name": "pages",
            "alias": "pages",
            "sample_len": 1,
            "perplexity,none": math.inf,
            "perplexity_stderr,none": math.nan,
        },
    },
    "group_subtasks": {"all": ["sums", "pages"]},
    "configs": {"sums": {"task": "sums"}, "pages": {"task": "pages"}},
    "versions": {"sums": 1.0, "pages": 2.0},
    "n-shot": {"sums": 3, "pages": 0},
    "higher_is_better": {"sums": {"exact_match": True}, "pages": {"perplexity": False}},
    "n-samples": {"sums": {"original": 9, "effective": 4}},
    "task_hashes": {"sums": "ab"},
    "config": {"batch_size": 16, "limit": 4, "fewshot_seed": 1234},
    "total_evaluation_time_seconds": "1.5",
}

RECORD = Record(
    cell="gpt2-rtn-4b-g32-cpu-tasks-0123456789ab",
    status="partial",
    config={
        "model": "gpt2",
        "method": "rtn",
        "bits": 4,
        "group_size": 32,
        "hardware": "cpu",
        "command": "python run.py model=gpt2",
        "resolved": {
            "model": {"id": "openai-community/gpt2", "revision": "607a30d"},
            "method": {"_target_": "methods.rtn.RTN", "name": "rtn", "symmetric": False},
        },
    },
    errors=(Failure("tasks", "config", "mmlu has no data"),),
    environment={"device": "cpu", "cpu": "one", "packages": {"lm_eval": "0.4.13"}},
    details={"model": {"parameters": 124, "commit": "607a30d"}},
    started="2026-01-02T03:04:05+00:00",
)


def refuse(literal: str) -> None:
    raise AssertionError(f"{literal} is no JSON")


def test_lm_evals_table_reads_it_and_every_other_reader_of_json_too(tmp_path: Path) -> None:
    write_results(RECORD, KEPT, tmp_path)
    found = json.loads((tmp_path / FILE_NAME).read_text(), parse_constant=refuse)
    table = make_table(found)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert rows == [
        ["- pages", "2", "none", "0", "perplexity", "↓", "", "±", "N/A"],
        ["- sums", "1", "strict-match", "3", "exact_match", "↑", "0.25", "±", "0.2500"],
    ]


def test_it_says_what_was_loaded_and_which_cell_this_is() -> None:
    found = document(RECORD, KEPT)
    assert found["config"]["model_args"] == {
        "pretrained": "openai-community/gpt2",
        "revision": "607a30d",
        "method": "rtn",
        "symmetric": False,
        "bits": 4,
        "group_size": 32,
    }
    assert (found["config"]["model_sha"], found["config"]["model_num_parameters"]) == (
        "607a30d",
        124,
    )
    assert (found["model_name"], found["model_source"]) == (RECORD.cell, "quantbench")
    assert (found["lm_eval_version"], found["date"]) == ("0.4.13", 1767323045.0)
    assert found["pretty_env_info"] == "device: cpu\ncpu: one\nlm_eval==0.4.13"
    assert found["quantbench"]["status"] == "partial"
    assert found["quantbench"]["errors"] == ["tasks: mmlu has no data"]
    assert found["quantbench"]["command"] == "python run.py model=gpt2"


def test_what_did_not_come_through_lm_eval_is_not_in_its_results() -> None:
    assert sorted(document(RECORD, KEPT)["results"]) == ["pages", "sums"]


@pytest.mark.parametrize("status", ["ok", "failed"])
def test_it_is_written_with_every_record_and_not_left_without_tasks(
    tmp_path: Path, status: Any
) -> None:
    job = {"cell": "c", "summary": {"model": "m", "method": "rtn"}, "folder": str(tmp_path)}
    (tmp_path / FILE_NAME).write_text("of an earlier run")
    progress = Progress(job, CPU)
    progress.write("failed", interrupted_at="tasks")
    assert not (tmp_path / FILE_NAME).exists()
    progress.lm_eval.update(KEPT)
    progress.write(status)
    found = json.loads((tmp_path / FILE_NAME).read_text())
    assert (found["quantbench"]["status"], found["quantbench"]["cell"]) == (status, "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json", FILE_NAME]


def test_it_needs_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules); import harness.lm_eval_results; "
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(tops - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['harness']"
