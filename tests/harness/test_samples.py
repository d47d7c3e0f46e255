"""The samples of a cell beside its record: columns, bytes, and when they are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from harness.context import Context
from harness.measure import Progress, _run_one
from harness.record import Value
from harness.samples import FILE_NAME, Answers, write_samples
from kernels.errors import ConfigError
from tests.harness.measures.surroundings import CPU, BigramEngine, drawn_ids, make_context

ACCURACY = Value("tasks", "acc", "t_0shot", 0.5, "share", True, None, (1.0, 0.0))
LOSSES = Value("perplexity", "perplexity", "p", 2.0, "perplexity", False, None, (0.1, 0.2, 0.3))
MEDIAN = Value("divergence", "kl_median", "p", 0.1, "nats", False)
ANSWERS = {("acc", "t_0shot"): Answers(("q0", "q1"), ("[-1.5, -2.0]", '"text"'))}


def test_each_sample_is_a_row(tmp_path: Path) -> None:
    write_samples([LOSSES, MEDIAN, ACCURACY], ANSWERS, tmp_path)
    table = pq.read_table(tmp_path / FILE_NAME)
    assert {field.name: field.type for field in table.schema} == {
        "measure": pa.string(),
        "metric": pa.string(),
        "protocol": pa.string(),
        "sample": pa.int32(),
        "value": pa.float64(),
        "question": pa.string(),
        "answer": pa.string(),
    }
    rows = table.to_pylist()
    assert [(row["measure"], row["sample"], row["value"]) for row in rows] == [
        ("perplexity", 0, 0.1),
        ("perplexity", 1, 0.2),
        ("perplexity", 2, 0.3),
        ("tasks", 0, 1.0),
        ("tasks", 1, 0.0),
    ]
    assert rows[2]["question"] is None
    assert rows[2]["answer"] is None
    assert (rows[4]["question"], rows[4]["answer"]) == ("q1", '"text"')


def test_equal_samples_are_equal_bytes(tmp_path: Path) -> None:
    write_samples([LOSSES, ACCURACY], ANSWERS, tmp_path / "a")
    write_samples([LOSSES, ACCURACY], dict(ANSWERS), tmp_path / "b")
    first = (tmp_path / "a" / FILE_NAME).read_bytes()
    assert (tmp_path / "b" / FILE_NAME).read_bytes() == first
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / FILE_NAME]


def test_without_samples_there_is_no_file(tmp_path: Path) -> None:
    write_samples([ACCURACY], ANSWERS, tmp_path)
    write_samples([MEDIAN], {}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Stub:
    """A measure that gives `values` and reports `problems`."""

    values: tuple[Value, ...]
    problems: tuple[tuple[str, Exception], ...] = ()
    quality: bool = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def run(self, engine: Any, context: Context) -> list[Value]:
        context.problems.update(self.problems)
        return list(self.values)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    job = {"cell": "c", "summary": {}, "folder": str(tmp_path)}
    progress, context = Progress(job, CPU), make_context(tmp_path, drawn_ids(1, 8))
    engine = BigramEngine(torch.zeros(4, 4))

    def one(name: str, measure: Any) -> Progress:
        _run_one(name, measure, engine, context, progress, lambda text: None)
        return progress

    return one


def test_samples_of_quality_are_written_after_each_measure(run: Any, tmp_path: Path) -> None:
    run("speed", Stub((LOSSES,), quality=False))
    assert not (tmp_path / FILE_NAME).exists()
    run("perplexity", Stub((LOSSES,)))
    assert len(pq.read_table(tmp_path / FILE_NAME)) == 3
    run("tasks", Stub((ACCURACY, MEDIAN)))
    assert len(pq.read_table(tmp_path / FILE_NAME)) == 5


def test_a_problem_of_a_part_leaves_the_values_of_the_rest(run: Any) -> None:
    problems = (("mmlu", ConfigError("mmlu has no data")), ("gsm8k", RuntimeError("it\nbroke")))
    progress = run("tasks", Stub((ACCURACY,), problems))
    assert progress.values == [ACCURACY]
    assert [(e.stage, e.kind, e.message) for e in progress.errors] == [
        ("tasks", "config", "mmlu has no data"),
        ("tasks", "RuntimeError", "gsm8k: it broke"),
    ]
    assert len(run("more", Stub((LOSSES,))).errors) == 2, "a problem is told once"
