"""What lm-eval itself would have left of an evaluation: its results, as its command line has them.

Source: `lm_eval.evaluator.simple_evaluate` and `lm_eval.loggers.EvaluationTracker` (0.4.13).
`harness.lm_eval_results` writes it beside the record. Questions and answers stay out: they are in
`samples.parquet`.

Standard errors are lm-eval's own: of a mean by its `mean_stderr`, of a group by the group's own
rule. Those that lm-eval draws 100,000 samples for (a perplexity's, a median's) are `N/A`, its word
for none, and `bootstrap_iters` says 0. This module imports lm_eval.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lm_eval.api.metrics import acc_all, acc_all_stderr, mean, mean_stderr
from lm_eval.loggers.utils import add_tokenizer_info
from lm_eval.utils import handle_non_serializable, hash_string

CLOSED_FORMS = {mean: mean_stderr, acc_all: acc_all_stderr}
"""Aggregation -> its standard error without drawing samples, as in `stderr_for_metric`."""


def lm_eval_output(results: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `evaluate` returned for the tasks `loaded`, as plain JSON without the samples."""
    found = {key: value for key, value in results.items() if key != "samples"}
    metrics = {name: dict(one) for name, one in found["results"].items()}
    for name, task in loaded["tasks"].items():
        metrics[name].update(_errors(task.aggregation(), results["samples"][name]))
    for name, group in loaded["groups"].items():
        metrics[name] = dict(group.aggregate(metrics))
    found["results"] = metrics
    if "groups" in found:
        found["groups"] = {name: metrics[name] for name in found["groups"]}
    found["task_hashes"] = {name: _task_hash(rows) for name, rows in results["samples"].items()}
    return _plain(found)


def model_output(model: Any, chat: bool, instruction: str | None) -> dict[str, Any]:
    """Return what lm-eval says of a model and the form of its prompts beside the results.

    `chat`: prompts are turns of a chat; `instruction` stands before everything.
    """
    found: dict[str, Any] = {}
    add_tokenizer_info(found, model)
    texts = {
        "chat_template": model.chat_template(chat) if chat else None,
        "system_instruction": instruction,
    }
    hashes = {f"{key}_sha": hash_string(text) if text else None for key, text in texts.items()}
    return _plain({**found, **texts, **hashes})


def merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put `more` into what is there, tasks beside tasks; what two measures differ in is None."""
    for key, value in more.items():
        if isinstance(value, dict) and key != "config":
            into.setdefault(key, {}).update(value)
        elif isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        else:
            into[key] = value if into.get(key, value) == value else None


def _errors(aggregations: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return lm-eval's standard errors of those of a task's metrics that have a closed form."""
    items: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        for metric in row["metrics"]:
            items.setdefault((metric, row["filter"]), []).append(row[metric])
    found = {}
    for (metric, kept), scores in items.items():
        # lm-eval takes the mean of a metric that names no aggregation.
        error = CLOSED_FORMS.get(aggregations.get(metric, mean))
        if error is not None and len(scores) > 1:
            found[f"{metric}_stderr,{kept}"] = float(error(scores))
    return found


def _task_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return lm-eval's hash of a task's questions, prompts and right answers."""
    hashes = [row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows]
    return str(hash_string("".join(hashes)))


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return `found` as lm-eval's own way of writing JSON leaves it."""
    plain: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    return plain
