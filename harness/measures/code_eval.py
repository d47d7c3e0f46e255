"""The scorer of generated code: runs each program in isolation and counts which pass their tests.

lm-eval's tasks that run code (`humaneval`, `mbpp`) fetch theirs from the hub with
`evaluate.load("code_eval")` and call it once when they are loaded. Within `scorer_replaced` that
name is this scorer, with the same interface and the same estimate; all else of a task is lm-eval's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from harness.sandbox import Limits, run_program
from kernels.errors import ConfigError

SCORER = "code_eval"
# What lm-eval's tasks ask when they are loaded, before there is a model: fixed text of its own,
# and the one call that is answered without permission, with what is known of it.
SELF_TEST = (("assert add(2, 3)==5",), (("def add(a,b): return a*b",),))
SELF_TEST_ENDS = "failed: AssertionError"

Details = dict[int, list[tuple[int, dict[str, Any]]]]


@dataclass(frozen=True)
class Permission:
    """Whether generated code may run, and within which limits."""

    allowed: bool
    limits: Limits


# Asked at each call: lm-eval keeps its task modules, and with them the scorer, for later uses.
_permission: ContextVar[Permission | None] = ContextVar("permission", default=None)


class CodeEval:
    """Hugging Face's metric `code_eval`, with each program run by `harness.sandbox`."""

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] | int = (1, 10, 100),
        num_workers: int = 4,
        timeout: float | None = None,
    ) -> tuple[dict[str, float], Details]:
        """Return pass@k over all problems, and how each candidate ended.

        Args:
            references: the test of each problem, which runs after the candidate.
            predictions: the candidates of each problem.
            k: numbers of tries; one above the candidates of some problem is left out.
            num_workers: programs run at once.
            timeout: wall-clock seconds of a program; None is the limits' own.

        Raises:
            ConfigError: code may not be run, or cannot be isolated on this machine.
        """
        if len(references) != len(predictions):
            raise ConfigError(
                f"code_eval got {len(references)} tests for the candidates of {len(predictions)}"
                " problems; it takes one test a problem"
            )
        permission = _permission.get()
        if permission is None or not permission.allowed:
            if not _is_self_test(references, predictions):
                raise not_allowed("this task")
            ended = [(False, SELF_TEST_ENDS)]
        else:
            limits = permission.limits
            if timeout is not None:
                limits = replace(limits, seconds=timeout)
            programs = [
                f"{candidate}\n{test}"
                for test, candidates in zip(references, predictions, strict=True)
                for candidate in candidates
            ]
            ended = _run(programs, limits, num_workers)
        details = _details(predictions, ended)
        counts = [
            (len(of_problem), sum(result["passed"] for _, result in of_problem))
            for of_problem in details.values()
        ]
        tries = (k,) if isinstance(k, int) else k
        return {
            f"pass@{n}": sum(pass_at(n, *count) for count in counts) / len(counts)
            for n in tries
            if counts and all(total >= n for total, _ in counts)
        }, details


def not_allowed(task: str) -> ConfigError:
    """Return the error that says what to pass, so that `task` may run what the model wrote."""
    return ConfigError(
        f"{task} runs code that the model wrote; allow it with"
        " suite.measures.tasks.allow_code_execution=true"
    )


def pass_at(k: int, candidates: int, passed: int) -> float:
    """Return the chance that one of `k` of the `candidates` passes, where `passed` of them do.

    Unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    return 1.0 - math.comb(candidates - passed, k) / math.comb(candidates, k)


@contextmanager
def scorer_replaced(allowed: bool, limits: Limits | None = None) -> Iterator[None]:
    """Let `evaluate.load("code_eval")` give `CodeEval`; other names go to the library itself.

    Args:
        allowed: whether programs may run; if not, scoring one is a ConfigError.
        limits: what each program may use; None is the defaults.
    """
    library = import_module("evaluate")
    load = library.load

    def load_ours(path: str, *args: Any, **options: Any) -> Any:
        return CodeEval() if path == SCORER else load(path, *args, **options)

    token = _permission.set(Permission(allowed, limits or Limits()))
    library.load = load_ours  # type: ignore[attr-defined]  # put back below
    try:
        yield
    finally:
        library.load = load  # type: ignore[attr-defined]  # as it was
        _permission.reset(token)


def _is_self_test(references: Sequence[str], predictions: Sequence[Sequence[str]]) -> bool:
    return (tuple(references), tuple(map(tuple, predictions))) == SELF_TEST


def _run(programs: Sequence[str], limits: Limits, workers: int) -> list[tuple[bool, str]]:
    with ThreadPoolExecutor(max_workers=max(1, min(workers, len(programs)))) as pool:
        outcomes = pool.map(lambda program: run_program(program, limits), programs)
        return [(outcome.passed, outcome.reason) for outcome in outcomes]


def _details(predictions: Sequence[Sequence[str]], ended: Sequence[tuple[bool, str]]) -> Details:
    """Return what the library's own scorer says of each candidate, by problem."""
    following = iter(ended)
    details: Details = {}
    for problem, candidates in enumerate(predictions):
        for number in range(len(candidates)):
            passed, reason = next(following)
            said = {"task_id": problem, "passed": passed, "result": reason, "completion_id": number}
            details.setdefault(problem, []).append((number, said))
    return details
