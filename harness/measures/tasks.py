"""Task accuracy through lm-eval: its own task definitions, scoring and answer extraction.

Any task, group or tag of lm-eval 0.4.13, the embedded ones, and those of a folder of the user's.
Nothing of a definition is changed but where its data come from. Each name asked for is loaded and
evaluated by itself, so that one that fails loses none of the others.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness.context import Context, ReferenceMissingError
from harness.embedded.tasks import NAMES
from harness.load import load_tokenizer
from harness.models import ModelSource
from harness.record import Value, digest
from harness.sandbox import Limits
from harness.task_files import include_folder
from harness.task_index import Part, parts_of, registry_of
from kernels.errors import ConfigError
from methods.base import Engine

if TYPE_CHECKING:
    from harness.measures.task_data import TaskData
    from harness.measures.task_values import Results

GENERATION_CONFIG = "generation_config.json"
GENERATES = "generate_until"


@dataclass(frozen=True)
class Tasks:
    """The scores that lm-eval gives, question by question.

    Attributes:
        tasks: names of lm-eval's tasks, groups or tags, of embedded tasks, or of `include`.
        limit: the first questions of each task; None is all. A mapping gives it by name, and a
            group's name stands for all its tasks.
        num_fewshot: worked examples before each question, or a mapping as `limit`; None is the
            task's own number.
        batch_size: sequences read at once.
        seed: seed of lm-eval's choice of worked examples; 1234 is its own default.
        apply_chat_template: put each question as a turn of a chat, by the tokenizer's template.
        fewshot_as_multiturn: worked examples as turns of their own.
        system_instruction: stands before everything.
        allow_code_execution: run what the model writes for tasks that test it, in a sandbox.
        code_timeout_seconds: time for each such program.
        include: folder with YAML files of own tasks.
    """

    tasks: Sequence[str] = NAMES
    limit: int | Mapping[str, int] | None = None
    num_fewshot: int | Mapping[str, int] | None = None
    batch_size: int = 16
    seed: int = 1234
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    allow_code_execution: bool = False
    code_timeout_seconds: float = 10.0
    include: str | None = None

    quality: ClassVar[bool] = True
    # What a task needs depends on the task.
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks:
            raise ConfigError("tasks is empty; it must name tasks of lm-eval, such as hellaswag")
        for option, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
            given = getattr(self, option)
            each = given.items() if isinstance(given, Mapping) else [("", given)]
            for name, number in each:
                if number is not None and (not isinstance(number, int) or number < least):
                    of = f" of {name}" if name else ""
                    raise ConfigError(
                        f"tasks' {option}{of} is {number}; it must be {least} or more"
                    )
        if self.code_timeout_seconds <= 0:
            raise ConfigError(
                f"tasks' code_timeout_seconds is {self.code_timeout_seconds}; it must be above 0"
            )
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ConfigError(
                "tasks' fewshot_as_multiturn makes turns of a chat, so apply_chat_template must be "
                "true with it"
            )

    def check(self, source: ModelSource, cache: Path) -> None:
        """Refuse what cannot work with the model `source`; no data are loaded.

        Raises:
            ConfigError: a name is unknown or there twice, or an option does not fit a task.
        """
        for part in self._parts(cache):
            self._check_part(part)
        folder = source.tokenizer_folder() if self.apply_chat_template else None
        tokenizer = load_tokenizer(folder) if folder is not None else None
        if tokenizer is not None:
            self._check_template(tokenizer)

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return one value a metric and filter of each task and group.

        What keeps a name from being measured goes to `context.problems`; what it needs and was
        not given (a capability, the permission to run code) to the notes.

        Raises:
            ConfigError: as `check`, where it shows without data.
        """
        from harness.measures.lm_eval_model import EngineModel
        from harness.measures.lm_eval_output import merge, model_output

        start = time.perf_counter()
        cache = context.cache.folder
        parts = self._parts(cache)
        if self.apply_chat_template:
            self._check_template(context.tokenizer)
        model = EngineModel(
            engine,
            context.tokenizer,
            batch_size=self.batch_size,
            stop_ids=_stop_ids(context.artefact),
            cache=context.cache,
            device=context.hardware.device,
        )
        registry = registry_of(self.tasks, parts, include_folder(self.include), cache)
        values: list[Value] = []
        with self._surroundings(context) as data:
            for asked in self.tasks:
                mine = [part for part in parts if part.asked == asked]
                missing = self._missing(mine, engine)
                if missing is not None:
                    context.details["notes"].append(f"{asked} not measured: {missing}")
                    continue
                try:
                    results, output = self._evaluate(model, mine, registry, data)
                except (ReferenceMissingError, MemoryError):
                    raise
                except Exception as error:  # noqa: BLE001  # one may break, the next still runs
                    context.problems[asked] = error
                    continue
                values += results.values
                context.details.setdefault("tasks", {}).update(results.details)
                context.answers.update(results.answers)
                merge(context.lm_eval, output)
        if context.lm_eval:
            form = model_output(model, self.apply_chat_template, self.system_instruction)
            merge(context.lm_eval, {**form, **self._asked(time.perf_counter() - start)})
        return values

    def _asked(self, seconds: float) -> dict[str, Any]:
        """Return what was asked, and how long it took, under lm-eval's names."""
        limit = dict(self.limit) if isinstance(self.limit, Mapping) else self.limit
        return {
            "config": {"batch_size": self.batch_size, "limit": limit, "fewshot_seed": self.seed},
            "fewshot_as_multiturn": self.fewshot_as_multiturn,
            "total_evaluation_time_seconds": str(seconds),
        }

    def _parts(self, cache: Path) -> list[Part]:
        """Return the tasks behind all names; what is wrong with the names is a ConfigError."""
        include = include_folder(self.include)
        parts = parts_of(self.tasks, include, cache)
        seen: dict[str, str] = {}
        for name in self.tasks:
            if self.tasks.count(name) > 1:
                raise ConfigError(f"tasks names {name} twice; name it once")
        for part in parts:
            if part.task in seen:
                raise ConfigError(
                    f"tasks has {part.task} twice, in {seen[part.task]} and in {part.asked}; "
                    "leave one of them out"
                )
            seen[part.task] = part.asked
        known = {name for part in parts for name in part.names}
        for option in ("limit", "num_fewshot"):
            given = getattr(self, option)
            # A suite's mapping stays good where fewer tasks are asked for; a slip does not.
            names = given if isinstance(given, Mapping) else {}
            try:
                for name in names:
                    if name not in known:
                        parts_of([name], include, cache)
            except ConfigError as error:
                raise ConfigError(f"{option}: {error}") from error
        return parts

    def _check_part(self, part: Part) -> None:
        """Refuse options that a task's definition does not allow; raises ConfigError."""
        shots = _of(self.num_fewshot, part)
        if shots and part.num_fewshot == 0:
            raise ConfigError(
                f"{part.task} has no worked examples: its num_fewshot must be null or 0"
            )
        if shots and not part.has_examples:
            raise ConfigError(
                f"{part.task} has no worked examples: its definition names no split for them, so "
                "its num_fewshot must be null or 0"
            )
        if part.samples:
            raise ConfigError(
                f"{part.task} asks for sampling; only greedy generation is compared, so leave it "
                "out"
            )

    def _check_template(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "tasks' apply_chat_template is true, but the model's tokenizer has no chat "
                "template; take the chat model's own tokenizer, or pass apply_chat_template=false"
            )

    def _missing(self, parts: Sequence[Part], engine: Engine) -> str | None:
        """Return what keeps `parts` from being measured, as the end of a sentence, or None."""
        able = engine.capabilities
        kinds = {part.output_type for part in parts} - {None}
        if kinds - {GENERATES} and not able & {"logits", "logprobs"}:
            return f"the engine ({engine.runtime}) cannot give logits or logprobs"
        if GENERATES in kinds and not ({"logits", "cache"} <= able or "generate" in able):
            return f"the engine ({engine.runtime}) cannot generate"
        if any(part.runs_code for part in parts) and not self.allow_code_execution:
            return (
                "it runs code that the model writes; to run it in a sandbox pass "
                "suite.measures.tasks.allow_code_execution=true"
            )
        return None

    @contextmanager
    def _surroundings(self, context: Context) -> Iterator[TaskData]:
        """Give lm-eval its data and its scorer of code, and keep it from writing to a terminal."""
        from harness.measures.code_eval import scorer_replaced
        from harness.measures.lm_eval_model import templates_compiled_once
        from harness.measures.task_data import data_from

        seconds = self.code_timeout_seconds
        limits = Limits(seconds=seconds, cpu_seconds=math.ceil(seconds))
        with ExitStack() as stack:
            # Its progress bars belong to no one here; errors come as exceptions.
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
            stack.enter_context(scorer_replaced(self.allow_code_execution, limits))
            # lm-eval compiles a prompt's template at every question otherwise.
            stack.enter_context(templates_compiled_once())
            yield stack.enter_context(data_from(context.task_folder, context.cache))

    def _evaluate(
        self, model: Any, parts: Sequence[Part], registry: Mapping[str, Any], data: TaskData
    ) -> tuple[Results, dict[str, Any]]:
        """Load the tasks behind one name and evaluate them together; also as lm-eval tells it."""
        from lm_eval.evaluator import evaluate

        from harness.measures.lm_eval_output import lm_eval_output
        from harness.measures.task_values import Results

        loaded = self._load(parts, registry, data)
        by_name = {part.task: part for part in parts}
        limits: dict[str, int | None] = {}
        for name, task in loaded["tasks"].items():
            limits[name] = _of(self.limit, by_name[name]) if name in by_name else None
            self._configure(name, task, by_name.get(name), limits[name])
        same = set(limits.values())
        several = {name: range(limit) for name, limit in limits.items() if limit is not None}
        # Not simple_evaluate: it spends a second on collecting facts of the environment.
        results = evaluate(
            model,
            loaded,
            limit=same.pop() if len(same) == 1 else None,
            samples=several if len(same) > 1 else None,
            bootstrap_iters=0,
            log_samples=True,
            system_instruction=self.system_instruction,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.fewshot_as_multiturn,
            confirm_run_unsafe_code=self.allow_code_execution,
        )
        values = Results(results, loaded, limits, self._form())
        return values, lm_eval_output(results, loaded)

    def _form(self) -> str:
        """Return what a protocol's name says of the form of the prompts."""
        chat = "_chat" if self.apply_chat_template else ""
        turns = "_multiturn" if self.fewshot_as_multiturn else ""
        if self.system_instruction is None:
            return chat + turns
        return f"{chat}{turns}_system{digest(self.system_instruction)[:6]}"

    def _load(
        self, parts: Sequence[Part], registry: Mapping[str, Any], data: TaskData
    ) -> dict[str, Any]:
        """Return what lm-eval's TaskManager makes of one name; ConfigError where data lack."""
        from lm_eval.tasks import TaskManager

        for part in parts:
            self._check_part(part)
        asked = parts[0].asked
        manager = TaskManager(include_defaults=False)
        manager.task_index.update(registry)
        data.absent.clear()
        try:
            loaded: dict[str, Any] = manager.load([asked])
        except ConfigError as error:
            raise ConfigError(f"{asked} cannot be loaded: {error}") from error
        except Exception as error:
            if not data.absent:
                raise
            # lm-eval looks at the first question of each task.
            raise ConfigError(
                f"{asked} cannot be loaded: its data lack the split {data.absent[-1]} (looked in "
                f"{data.folder}); put it there, or name another folder with data.tasks=FOLDER"
            ) from error
        return loaded

    def _configure(self, name: str, task: Any, part: Part | None, limit: int | None) -> None:
        """Set what was asked for, as lm-eval's simple_evaluate does; ConfigError if it cannot."""
        shots = _of(self.num_fewshot, part) if part is not None else None
        shots = task.get_config("num_fewshot") or 0 if shots is None else shots
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=self.seed)
        whose = f"{name}, a part of {part.asked}," if part and part.asked != name else name
        examples = len(task.sampler.df) if hasattr(task, "sampler") else shots
        if shots > examples:
            raise ConfigError(
                f"num_fewshot is {shots}, but {whose} has {examples} worked examples in its data"
            )
        if limit is not None and limit > len(task.eval_docs):
            raise ConfigError(f"limit is {limit}, but {whose} has {len(task.eval_docs)} questions")


def _of(given: int | Mapping[str, int] | None, part: Part) -> int | None:
    """Return an option for one task: what the nearest of its names says."""
    if not isinstance(given, Mapping):
        return given
    return next((given[name] for name in reversed(part.names) if name in given), None)


def _stop_ids(artefact: Path) -> list[int]:
    """Return the tokens that end a text by the model's own generation configuration."""
    path = artefact / GENERATION_CONFIG
    if not path.exists():
        return []
    found = json.loads(path.read_text()).get("eos_token_id")
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)
