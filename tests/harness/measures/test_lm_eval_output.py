"""What is kept of lm-eval's results is what its own evaluation leaves, groups included."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.evaluator
import pytest
import torch
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.lm_eval_results import document
from harness.measures.lm_eval_output import merge
from harness.measures.tasks import Tasks
from harness.record import Record
from harness.task_index import parts_of, registry_of
from tests.harness.measures.surroundings import drawn_ids, engine_of, make_context
from tests.harness.measures.test_tasks import EMBEDDED, engine, mmlu_folder, surroundings

QUESTIONS = 4
RECORD = Record(
    cell="embedded-rtn-cpu",
    status="ok",
    config={"model": "embedded", "method": "rtn", "bits": 4, "group_size": 32},
    started="2026-01-02T03:04:05+00:00",
)


def test_it_is_what_simple_evaluate_and_its_tracker_leave(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    context = make_context(tmp_path, drawn_ids(1, 8), tokenizer=tokenizer)
    measure = Tasks(("embedded_facts", "embedded_sums"), limit=QUESTIONS)
    measure.run(engine_of(model), context)
    registry = registry_of(measure.tasks, parts_of(measure.tasks, None, tmp_path), None, tmp_path)
    tracker = EvaluationTracker(output_path=str(tmp_path / "peer"))
    theirs = lm_eval.evaluator.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=QUESTIONS),
        tasks=[registry[name].cfg for name in measure.tasks],
        limit=QUESTIONS,
        evaluation_tracker=tracker,
        task_manager=TaskManager(include_defaults=False),
        fewshot_as_multiturn=False,
    )
    samples = theirs.pop("samples")
    tracker.save_results_aggregated(theirs, samples)
    (left,) = (tmp_path / "peer").rglob("results_*.json")
    expected = json.loads(left.read_text())
    found = json.loads(json.dumps(document(RECORD, context.lm_eval)))
    measured = ("results", "n-shot", "versions", "higher_is_better", "n-samples", "task_hashes")
    said = ("group_subtasks", "configs", "tokenizer_eos_token", "tokenizer_pad_token")
    form = ("eot_token_id", "max_length", "chat_template", "system_instruction_sha")
    for key in (*measured, *said, *form):
        assert found[key] == expected[key], key
    spreads = [one[key] for one in found["results"].values() for key in one if "_stderr," in key]
    assert len(spreads) == 3
    assert all(isinstance(spread, float) for spread in spreads)
    assert set(expected) - set(found) == set()
    assert set(found) - set(expected) == {"quantbench"}
    assert set(expected["config"]) - set(found["config"]) <= {"model_dtype"}
    assert found["config"]["limit"] == expected["config"]["limit"] == QUESTIONS


def test_groups_are_lm_evals_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, expected = lm_eval.evaluator.evaluate, []

    def both(model: Any, loaded: Any, **options: Any) -> Any:
        # One draw is not used: every metric of these tasks is a mean.
        expected.append(real(model, loaded, **{**options, "bootstrap_iters": 1}))
        return real(model, loaded, **options)

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", both)
    context = surroundings(tmp_path)
    own = str(mmlu_folder(tmp_path))
    Tasks(["whole", "hellaswag"], include=own, limit={"mmlu_anatomy": 3}).run(engine(), context)
    kept = context.lm_eval
    group, alone = expected
    for key in ("results", "group_subtasks", "groups", "n-shot", "versions", "n-samples"):
        assert kept[key] == {**group.get(key, {}), **alone.get(key, {})}, key
    stem = kept["results"]["stem"]
    assert stem["acc_stderr,none"] > 0
    assert (stem["sample_len"], kept["group_subtasks"]["whole"]) == (7, ["stem"])
    assert kept["groups"] == {"stem": stem}
    assert kept["config"]["limit"] == {"mmlu_anatomy": 3}


def test_an_error_that_lm_eval_would_draw_is_not_available(tmp_path: Path) -> None:
    context = surroundings(tmp_path)
    Tasks(["lambada_openai"]).run(engine(), context)
    found = context.lm_eval["results"]["lambada_openai"]
    assert found["perplexity_stderr,none"] == "N/A"
    assert found["perplexity,none"] > 1
    assert isinstance(found["acc_stderr,none"], float)


def test_what_fails_is_not_there_and_what_two_measures_differ_in_is_none(tmp_path: Path) -> None:
    context = surroundings(tmp_path)
    Tasks(["lambada_openai"], limit=2, seed=1).run(engine(), context)
    Tasks(["hellaswag", "wikitext"], limit=2, seed=2).run(engine(), context)
    assert list(context.problems) == ["wikitext"]
    assert sorted(context.lm_eval["results"]) == ["hellaswag", "lambada_openai"]
    options = {"batch_size": 16, "limit": 2, "fewshot_seed": None}
    assert context.lm_eval["config"] == options


def test_where_nothing_was_evaluated_nothing_is_kept(tmp_path: Path) -> None:
    context = surroundings(tmp_path)
    Tasks(["humaneval"]).run(engine(), context)
    assert context.lm_eval == {}


def test_merging_keeps_tasks_apart() -> None:
    into: dict[str, Any] = {}
    one = SimpleNamespace(results={"a": 1}, limit=3)
    merge(into, {"results": one.results, "config": {"limit": one.limit}, "max_length": 8})
    merge(into, {"results": {"b": 2}, "config": {"limit": 4}, "max_length": 8})
    assert into == {"results": {"a": 1, "b": 2}, "config": {"limit": None}, "max_length": 8}
