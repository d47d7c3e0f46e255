"""lm-eval's results as values of a record: one a metric and filter, of tasks and of groups.

A task's samples are its questions' scores in document order, a group's those of its tasks one
after the other, so that two methods can be compared question by question. lm-eval's own aggregate
is the value; samples stand beside it only where it is their mean (or, of log-likelihoods, the
perplexity exp(-mean)).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.measures.statistics import stderr_of_mean
from harness.record import Value
from harness.samples import Answers

FILTER_SUFFIX = {"none": "", "strict-match": "_strict", "flexible-extract": "_flexible"}
UNITS = {"bits_per_byte": "bit/B"}
EQUAL = 1e-9
LL_DIGITS = 6

Scores = dict[tuple[str, str], list[Any]]
"""(metric, filter) -> one entry a question, in document order."""


@dataclass(frozen=True)
class Question:
    """What is known of the questions of one task.

    Attributes:
        hashes: lm-eval's hash of each question, in document order.
        answers: filter -> what the model answered to each, as JSON.
        choices: how many choices each has; 0 where the answer is free.
    """

    hashes: tuple[str, ...]
    answers: Mapping[str, tuple[str, ...]]
    choices: tuple[int, ...]


class Results:
    """What one call of lm-eval's `evaluate` returned, and what it was asked.

    Args:
        results: what it returned.
        loaded: the tasks and groups it was given.
        limits: task -> the questions asked for; None is all.
        form: what protocols say of the form of the prompts (`_chat`).

    Attributes:
        values: one a metric and filter.
        details: task or group -> what `Record.details` says of it.
        answers: (metric, protocol) -> questions and answers behind the samples.
    """

    def __init__(
        self,
        results: Mapping[str, Any],
        loaded: Mapping[str, Any],
        limits: Mapping[str, int | None],
        form: str,
    ) -> None:
        self.values: list[Value] = []
        self.details: dict[str, dict[str, Any]] = {}
        self.answers: dict[tuple[str, str], Answers] = {}
        self._results = results
        self._limits = limits
        self._form = form
        self._scores = {name: _scores(rows) for name, rows in results["samples"].items()}
        self._questions = {name: _questions(rows) for name, rows in results["samples"].items()}
        groups = loaded["groups"]
        above = {child: name for name, under in loaded["group_map"].items() for child in under}
        for name, task in loaded["tasks"].items():
            self._add(name, [name], task.VERSION, above.get(name))
        for name, group in groups.items():
            parts = list(dict.fromkeys(task.task_name for task in group.get_all_tasks()))
            self._add(name, parts, group.version, above.get(name))

    def _add(self, name: str, parts: Sequence[str], version: Any, group: str | None) -> None:
        """Add the values of a task, or of a group of the tasks `parts`."""
        shots = sorted({int(self._results["n-shot"][part]) for part in parts})
        protocol = f"{name}_{'-'.join(map(str, shots))}shot{self._form}{self._limited(parts)}"
        aggregated = self._results["results"].get(name, {})
        filters = dict.fromkeys(f for part in parts for _, f in self._scores[part])
        metrics: list[str] = []
        for metric, kept in dict.fromkeys(key for part in parts for key in self._scores[part]):
            # A group without aggregation has no value of its own.
            if f"{metric},{kept}" not in aggregated:
                continue
            value = self._value(
                (metric, kept), metric + _suffix(kept, len(filters)), protocol, parts,
                float(aggregated[f"{metric},{kept}"]),
            )  # fmt: skip
            metrics.append(value.metric)
            self.values.append(value)
            if value.samples:
                self.answers[value.metric, protocol] = self._answered(parts, kept)
        hashes = [one for part in parts for one in self._questions[part].hashes]
        self.details[name] = {
            "group": group,
            "questions": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
            "count": len(hashes),
            "num_fewshot": shots[0] if len(shots) == 1 else None,
            "version": str(version),
            "metrics": metrics,
            **self._chance(parts, metrics),
        }

    def _chance(self, parts: Sequence[str], metrics: Sequence[str]) -> dict[str, float]:
        """Return the share of right answers that guessing gives, where all have choices."""
        choices = [one for part in parts for one in self._questions[part].choices]
        # Mutual information asks for each choice twice.
        if not choices or min(choices) < 2 or "acc_mutual_info" in metrics:
            return {}
        return {"chance": math.fsum(1 / one for one in choices) / len(choices)}

    def _limited(self, parts: Iterable[str]) -> str:
        """Return the end of a protocol: the first N questions of each task, where that is fewer."""
        counts = {part: self._results["n-samples"][part] for part in parts}
        if all(count["effective"] == count["original"] for count in counts.values()):
            return ""
        asked = sorted({self._limits[part] or 0 for part in counts})
        return "_limit" + "-".join("all" if limit == 0 else str(limit) for limit in asked)

    def _value(
        self, key: tuple[str, str], metric: str, protocol: str, parts: Sequence[str], value: float
    ) -> Value:
        raw = [score for part in parts for score in self._scores[part].get(key, [])]
        samples = [float(score) for score in raw if isinstance(score, (int, float))]
        mean = math.fsum(samples) / len(samples) if samples else math.nan
        perplexity = "perplexity" in key[0]
        whole = len(samples) == len(raw)
        is_perplexity = whole and perplexity and math.isclose(value, _exp(-mean), rel_tol=EQUAL)
        if not is_perplexity and not (whole and abs(value - mean) <= EQUAL):
            samples = []
        shares = bool(samples) and min(samples) >= 0 and max(samples) <= 1
        error = _stderr(samples)
        if error is not None and is_perplexity:
            # The delta method, as for the perplexity of a text.
            error = value * error if math.isfinite(value) else None
        unit = "perplexity" if perplexity else "share" if shares else "score"
        better = {self._results["higher_is_better"][part].get(key[0]) for part in parts}
        return Value(
            "tasks",
            metric,
            protocol,
            value,
            UNITS.get(key[0], unit),
            better.pop() if len(better) == 1 else None,
            error,
            tuple(samples),
        )

    def _answered(self, parts: Sequence[str], kept: str) -> Answers:
        """Return questions and answers of `parts` one after the other."""
        questions = [one for part in parts for one in self._questions[part].hashes]
        answers = [one for part in parts for one in self._questions[part].answers[kept]]
        return Answers(tuple(questions), tuple(answers))


def _suffix(kept: str, filters: int) -> str:
    """Return what tells the metric of one filter from that of another."""
    if kept in FILTER_SUFFIX:
        return FILTER_SUFFIX[kept]
    return f"_{kept.replace('-', '_')}" if filters > 1 else ""


def _in_order(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: int(row["doc_id"]))


def _scores(rows: Iterable[Mapping[str, Any]]) -> Scores:
    scores: Scores = {}
    for row in _in_order(rows):
        for metric in row["metrics"]:
            score = row[metric]
            # NumPy's scalars are no Python numbers.
            plain = score.item() if hasattr(score, "item") else score
            scores.setdefault((metric, row["filter"]), []).append(plain)
    return scores


def _questions(rows: Iterable[Mapping[str, Any]]) -> Question:
    answers: dict[str, list[str]] = {}
    hashes: dict[int, str] = {}
    choices: dict[int, int] = {}
    for row in _in_order(rows):
        document, responses = int(row["doc_id"]), row["filtered_resps"]
        hashes[document] = str(row["doc_hash"])
        choices[document] = len(responses) if _are_likelihoods(responses) else 0
        answers.setdefault(row["filter"], []).append(_answer(responses))
    return Question(
        tuple(hashes.values()),
        {name: tuple(each) for name, each in answers.items()},
        tuple(choices.values()),
    )


def _are_likelihoods(responses: Sequence[Any]) -> bool:
    """Whether each response is (log-likelihood, whether it is the likeliest)."""
    pairs = all(isinstance(one, (tuple, list)) and len(one) == 2 for one in responses)
    return pairs and all(isinstance(one[0], float) for one in responses)


def _answer(responses: Sequence[Any]) -> str:
    """Return the responses to one question: log-likelihoods in nats, or the text extracted."""
    if _are_likelihoods(responses):
        return json.dumps([round(one[0], LL_DIGITS) for one in responses])
    shown = responses[0] if len(responses) == 1 else list(responses)
    return json.dumps(shown, ensure_ascii=False, default=str)


def _exp(power: float) -> float:
    try:
        return math.exp(power)
    except OverflowError:
        return math.inf


def _stderr(samples: Sequence[float]) -> float | None:
    """Return sqrt(p (1 - p) / n) for answers that are right or wrong, else that of a mean."""
    if samples and set(samples) <= {0.0, 1.0}:
        share = sum(samples) / len(samples)
        return math.sqrt(share * (1 - share) / len(samples))
    return stderr_of_mean(samples) if samples else None
