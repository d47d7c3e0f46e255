from __future__ import annotations

import gzip
import itertools
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import evaluate
import pytest

from harness.measures import code_eval
from harness.measures.code_eval import CodeEval, pass_at, scorer_replaced
from harness.sandbox import Limits, Outcome, run_program
from kernels.errors import ConfigError

SHARED = Path(os.environ.get("QUANTBENCH_SHARED", str(Path(__file__).parents[3].parent / "shared")))
HUMANEVAL = SHARED / "datasets" / "openai" / "openai_humaneval" / "test.jsonl.gz"
TEST = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"
RIGHT = "def add(a, b):\n    return a + b"
WRONG = "def add(a, b):\n    return a * b"
SELF_TEST = (["assert add(2, 3)==5"], [["def add(a,b): return a*b"]])
LM_EVAL_MODULES = ("lm_eval.tasks.humaneval.utils", "lm_eval.tasks.mbpp.utils")


@pytest.fixture(scope="module")
def isolation() -> None:
    try:
        assert run_program("").passed
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs that would have been run; one passes where its sum is right."""
    programs: list[str] = []

    def run(source: str, limits: Limits) -> Outcome:
        programs.append(source)
        return Outcome(RIGHT in source, f"ended within {limits.seconds} s")

    monkeypatch.setattr(code_eval, "run_program", run)
    return programs


# --- the estimate -------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one() -> None:
    for candidates in range(1, 7):
        for passed in range(candidates + 1):
            answers = [True] * passed + [False] * (candidates - passed)
            for k in range(1, candidates + 1):
                draws = list(itertools.combinations(answers, k))
                share = sum(map(any, draws)) / len(draws)
                assert pass_at(k, candidates, passed) == pytest.approx(share, abs=1e-12)
    # 1 - prod(1 - k / i for i in n - c + 1 ... n), as the paper's own code has it
    assert pass_at(10, 200, 3) == pytest.approx(1 - (190 * 189 * 188) / (200 * 199 * 198))


def test_candidates_are_counted_by_problem(counted: list[str]) -> None:
    with scorer_replaced(allowed=True):
        scores, details = CodeEval().compute(
            references=[TEST, TEST], predictions=[[RIGHT, WRONG], [WRONG, WRONG]], k=[1, 2, 3]
        )
    # Three tries of two candidates say nothing.
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert counted == [f"{one}\n{TEST}" for one in (RIGHT, WRONG, WRONG, WRONG)]
    assert details[0][1] == (
        1,
        {"task_id": 0, "passed": False, "result": "ended within 10.0 s", "completion_id": 1},
    )
    assert [number for number, _ in details[1]] == [0, 1]


def test_a_timeout_of_the_call_wins(counted: list[str]) -> None:
    with scorer_replaced(allowed=True, limits=Limits(seconds=7.0)):
        ours = CodeEval()
        assert ours.compute([TEST], [[RIGHT]], k=1)[1][0][0][1]["result"] == "ended within 7.0 s"
        late = ours.compute(references=[TEST], predictions=[[RIGHT]], k=[1], timeout=3.0)
        assert late[1][0][0][1]["result"] == "ended within 3.0 s"


def test_each_problem_needs_a_test() -> None:
    with (
        scorer_replaced(allowed=True),
        pytest.raises(ConfigError, match="1 tests for the candidates of 2"),
    ):
        CodeEval().compute(references=[TEST], predictions=[[RIGHT], [RIGHT]])


# --- permission ---------------------------------------------------------------------------------


def test_without_permission_nothing_runs(counted: list[str]) -> None:
    sentence = "runs code that the model wrote; allow it with suite.measures.tasks.allow_code_exec"
    with scorer_replaced(allowed=False), pytest.raises(ConfigError, match=sentence):
        CodeEval().compute(references=[TEST], predictions=[[RIGHT]], k=[1])
    with pytest.raises(ConfigError, match=sentence):
        CodeEval().compute(references=[TEST], predictions=[[RIGHT]], k=[1])
    assert counted == []


def test_only_the_self_test_is_answered_without_permission(counted: list[str]) -> None:
    tests, candidates = SELF_TEST
    with scorer_replaced(allowed=False):
        assert CodeEval().compute(tests, candidates, k=[1])[0] == {"pass@1": 0.0}
        for other in ([["def add(a,b): return a*b "]], [[*candidates[0], RIGHT]]):
            with pytest.raises(ConfigError, match="allow_code_execution=true"):
                CodeEval().compute(references=tests, predictions=other, k=[1])
    assert counted == []


@pytest.mark.usefixtures("isolation")
def test_what_is_answered_of_the_self_test_is_what_running_it_says() -> None:
    tests, candidates = SELF_TEST
    with scorer_replaced(allowed=False):
        known = CodeEval().compute(tests, candidates, k=[1])
    with scorer_replaced(allowed=True):
        assert CodeEval().compute(tests, candidates, k=[1]) == known


def test_only_this_scorer_is_replaced_and_only_within(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(path: str, *rest: Any, **options: Any) -> Any:
        return path, rest, options

    monkeypatch.setattr(evaluate, "load", library)
    with scorer_replaced(allowed=False):
        assert isinstance(evaluate.load("code_eval"), CodeEval)
        assert evaluate.load("rouge", "x", seed=1) == ("rouge", ("x",), {"seed": 1})
        with scorer_replaced(allowed=True):
            assert isinstance(evaluate.load("code_eval"), CodeEval)
        assert isinstance(evaluate.load("code_eval"), CodeEval)
    assert evaluate.load is library
    with pytest.raises(RuntimeError), scorer_replaced(allowed=True):
        raise RuntimeError
    assert evaluate.load is library


def test_lm_evals_own_modules_follow_the_permission_of_the_call(
    counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LM_EVAL_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    # Loaded where nothing may run, and used again as they are where it may.
    with scorer_replaced(allowed=False):
        humaneval, mbpp = map(import_module, LM_EVAL_MODULES)
        assert counted == []
        with pytest.raises(ConfigError, match="allow_code_execution=true"):
            humaneval.pass_at_k(references=[TEST], predictions=[[RIGHT]], k=[1])
    with scorer_replaced(allowed=True):
        again = import_module(LM_EVAL_MODULES[0])
        assert again is humaneval
        assert humaneval.pass_at_k([TEST], [[RIGHT]], k=1) == {"pass@1": 1.0}
        assert mbpp.pass_at_1(TEST, [WRONG]) == 0.0
    assert counted == [f"{RIGHT}\n{TEST}", f"{WRONG}\n{TEST}"]
    with pytest.raises(ConfigError, match="allow_code_execution=true"):
        mbpp.pass_at_1([TEST], [[RIGHT]])


# --- real programs ------------------------------------------------------------------------------

PROBLEMS = [
    ("def f(n):\n", "    return n + 1\n", "    return n\n", "assert candidate(1) == 2"),
    (
        "from typing import List\n\n\ndef f(values: List[int]) -> List[int]:\n    ''' . '''\n",
        "    return sorted(values)\n",
        "    return values\n",
        "assert candidate([3, 1, 2]) == [1, 2, 3]",
    ),
    (
        "import math\n\ndef f(x):\n",
        "    return math.sqrt(x)\n",
        "    return math.sqr(x)\n",
        "assert abs(candidate(2.0) - 1.41421356) < 1e-6",
    ),
    ("def f(x):\n", "    return x[::-1]\n", "    return x[::-1\n", "assert candidate([]) == []"),
    (
        "def f(n):\n",
        "    return 1 if n < 2 else n * f(n - 1)\n",
        "    return n * f(n - 1)\n",
        "assert candidate(5) == 120",
    ),
    ("def f():\n", "    return 4\n", "    raise SystemExit(0)\n", "assert candidate() == 4"),
]  # fmt: skip


@pytest.mark.usefixtures("isolation")
def test_right_programs_pass_and_wrong_ones_fail() -> None:
    tests = [f"def check(candidate):\n    {test}\n\ncheck(f)" for *_, test in PROBLEMS]
    both = [[prompt + right, prompt + wrong] for prompt, right, wrong, _ in PROBLEMS]
    with scorer_replaced(allowed=True):
        scores, details = evaluate.load("code_eval").compute(
            references=tests, predictions=both, k=[1, 2]
        )
    assert scores == {"pass@1": 0.5, "pass@2": 1.0}
    for of_problem in details.values():
        assert [result["passed"] for _, result in of_problem] == [True, False]
        assert of_problem[0][1]["result"] == "passed"
        assert of_problem[1][1]["result"].startswith("failed: ")


needs_humaneval = pytest.mark.skipif(
    not HUMANEVAL.is_file(),
    reason="the real HumanEval is not here; QUANTBENCH_SHARED names its folder",
)


@pytest.fixture(scope="module")
def problems() -> list[dict[str, str]]:
    with gzip.open(HUMANEVAL, "rt") as lines:
        return [json.loads(line) for line in lines]


def scores_of(problems: list[dict[str, str]], answers: list[str]) -> tuple[float, list[str]]:
    """Return pass@1, and of each problem how it ended, as lm-eval's task puts them together."""
    tests = [f"{one['test']}\ncheck({one['entry_point']})" for one in problems]
    candidates = [[one["prompt"] + answer] for one, answer in zip(problems, answers, strict=True)]
    with scorer_replaced(allowed=True, limits=Limits(seconds=30.0)):
        scores, details = evaluate.load("code_eval").compute(
            references=tests, predictions=candidates, k=[1], num_workers=2
        )
    return scores["pass@1"], [details[number][0][1]["result"] for number in range(len(problems))]


@needs_humaneval
@pytest.mark.usefixtures("isolation")
def test_humaneval_own_solutions_pass(problems: list[dict[str, str]]) -> None:
    assert len(problems) == 164
    score, ended = scores_of(problems, [one["canonical_solution"] for one in problems])
    assert set(ended) == {"passed"}
    assert score == 1.0


@needs_humaneval
@pytest.mark.usefixtures("isolation")
def test_humaneval_broken_solutions_fail(problems: list[dict[str, str]]) -> None:
    # What is wrong differs: nothing, a constant, the end before the tests, and no Python.
    broken = [
        "    return None\n",
        "    return 12345\n",
        "    raise SystemExit(0)\n",
        "    return (\n",
    ]
    answers = [broken[number % len(broken)] for number in range(len(problems))]
    score, ended = scores_of(problems, answers)
    assert score == 0.0
    assert all(said.startswith("failed: ") for said in ended)
    assert all(said == "failed: SystemExit: 0" for said in ended[2::4])
    assert all(said.startswith("failed: SyntaxError") for said in ended[3::4])
