"""Task accuracy through lm-eval: its own task definitions, scoring and answer extraction.

Each value is one metric of one task with the 0 or 1 of every question as samples, in document
order, so that two methods can be compared question by question.
"""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.context import Context
from harness.embedded.tasks import NAMES, embedded_tasks
from harness.measures.statistics import stderr_of_mean
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine

FILTER_SUFFIX = {"none": "", "strict-match": "_strict", "flexible-extract": "_flexible"}
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Tasks:
    """The share of right answers in each task.

    Attributes:
        tasks: names of embedded tasks.
        limit: questions of each task, from its start; None is all.
        num_fewshot: worked examples before each question; None is the task's own number.
        batch_size: sequences read at once.
        seed: seed of lm-eval's choice of worked examples; 1234 is its own default.
    """

    tasks: Sequence[str] = NAMES
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 16
    seed: int = 1234

    quality: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "cache"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        unknown = [name for name in self.tasks if name not in NAMES]
        if unknown or not self.tasks:
            raise ConfigError(
                f"tasks is {list(self.tasks)}; it must name some of {', '.join(NAMES)}"
            )
        for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise ConfigError(f"tasks' {name} is {given}; it must be {least} or more")

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return one value a task and metric.

        Raises:
            ConfigError: more questions are asked for than a task has, or examples of a task that
                fixes their number at none.
        """
        # lm-eval takes half a second to import and nothing else needs it.
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        from harness.measures.lm_eval_model import EngineModel, templates_compiled_once

        stop_ids = _stop_ids(context.artefact)
        model = EngineModel(engine, context.tokenizer, self.batch_size, stop_ids)
        # Its progress bars belong to no one here; errors come as exceptions.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            manager = TaskManager(include_defaults=False)
            loaded = manager.load(self._definitions(context))
            for name, task in loaded["tasks"].items():
                self._configure(name, task)
            # Not simple_evaluate: it spends a second on collecting facts of the environment.
            with templates_compiled_once():
                results = evaluate(
                    model, loaded, limit=self.limit, bootstrap_iters=0, log_samples=True
                )
        values: list[Value] = []
        for name, task in loaded["tasks"].items():
            protocol = f"{name}_{task.get_config('num_fewshot')}shot"
            if self.limit is not None and self.limit < len(task.eval_docs):
                protocol += f"_limit{self.limit}"
            values += _values(protocol, results["results"][name], results["samples"][name])
        return values

    def _definitions(self, context: Context) -> list[dict[str, Any]]:
        """Return the tasks' configurations; their data is converted into the sweep's own cache."""
        definitions = embedded_tasks(tuple(self.tasks))
        for definition in definitions:
            definition["dataset_kwargs"]["cache_dir"] = str(context.cache.folder / "datasets")
        return definitions

    def _configure(self, name: str, task: Any) -> None:
        own = task.get_config("num_fewshot")
        if self.num_fewshot is not None and own == 0 and self.num_fewshot != 0:
            raise ConfigError(f"{name} has no worked examples: num_fewshot must be null or 0")
        task.set_config(key="num_fewshot", value=own or 0)
        if self.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=self.num_fewshot)
        task.set_fewshot_seed(seed=self.seed)
        if self.limit is not None and self.limit > len(task.eval_docs):
            raise ConfigError(
                f"limit is {self.limit}, but {name} has {len(task.eval_docs)} questions"
            )


def _stop_ids(artefact: Path) -> list[int]:
    """Return the tokens that end a text by the model's own generation configuration."""
    path = artefact / GENERATION_CONFIG
    if not path.exists():
        return []
    found = json.loads(path.read_text()).get("eos_token_id")
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)


def _values(
    protocol: str, aggregated: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]
) -> list[Value]:
    """Return one value for each metric and filter of one task."""
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    for answer in sorted(answers, key=lambda answer: int(answer["doc_id"])):
        for metric in answer["metrics"]:
            samples[metric, answer["filter"]].append(float(answer[metric]))
    return [
        Value(
            "tasks",
            metric + FILTER_SUFFIX.get(extraction, f"_{extraction.replace('-', '_')}"),
            protocol,
            float(aggregated[f"{metric},{extraction}"]),
            "share",
            True,
            _stderr(of_questions),
            tuple(of_questions),
        )
        for (metric, extraction), of_questions in samples.items()
    ]


def _stderr(samples: list[float]) -> float | None:
    """Return sqrt(p (1 - p) / n) for answers that are right or wrong, else that of a mean."""
    if set(samples) <= {0.0, 1.0}:
        share = sum(samples) / len(samples)
        return math.sqrt(share * (1 - share) / len(samples))
    return stderr_of_mean(samples)
