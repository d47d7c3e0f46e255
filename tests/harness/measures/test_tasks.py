"""Tasks of lm-eval with data from a folder: what is measured, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.context import Context
from harness.measures import code_eval
from harness.measures.tasks import Tasks
from harness.record import Value
from harness.task_index import parts_of, registry_of
from kernels.errors import ConfigError
from tests.architectures import VOCABULARY, tiny_tokenizer
from tests.harness.measures.surroundings import (
    BigramEngine,
    drawn_ids,
    drawn_table,
    engine_of,
    make_context,
)
from tests.harness.task_folders import SUBJECTS, data_folder, sums, with_index, write

EMBEDDED = Path(__file__).resolve().parents[3] / "harness" / "embedded" / "model"
QUESTIONS = 6


def surroundings(tmp_path: Path, data: Path | None = None) -> Context:
    context = make_context(tmp_path, drawn_ids(1, 8), tokenizer=tiny_tokenizer())
    with_index(context.cache.folder)
    context.task_folder = data or data_folder(tmp_path / "data")
    return context


def engine(capabilities: frozenset[str] | None = None) -> Any:
    made = BigramEngine(drawn_table(VOCABULARY))
    made.capabilities = made.capabilities if capabilities is None else capabilities
    return made


def by_name(values: list[Value]) -> dict[tuple[str, str], Value]:
    assert len({(v.protocol, v.metric) for v in values}) == len(values)
    return {(value.protocol, value.metric): value for value in values}


def sentences(context: Context) -> list[str]:
    assert all(isinstance(error, ConfigError) for error in context.problems.values())
    return [str(error) for error in context.problems.values()]


def test_embedded_tasks_are_scored_as_lm_eval_scores_them(tmp_path: Path) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    context = make_context(tmp_path, drawn_ids(1, 8), tokenizer=tokenizer)
    measure = Tasks(limit=QUESTIONS)
    values = by_name(measure.run(engine_of(model), context))
    registry = registry_of(measure.tasks, parts_of(measure.tasks, None, tmp_path), None, tmp_path)
    loaded = TaskManager(include_defaults=False).load([registry[n].cfg for n in measure.tasks])
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=QUESTIONS)
    expected = evaluate(peer, loaded, limit=QUESTIONS, bootstrap_iters=0)["results"]
    assert {key: value.value for key, value in values.items()} == {
        ("embedded_endings_0shot_limit6", "acc"): expected["embedded_endings"]["acc,none"],
        ("embedded_endings_0shot_limit6", "acc_norm"): expected["embedded_endings"][
            "acc_norm,none"
        ],
        ("embedded_facts_5shot_limit6", "acc"): expected["embedded_facts"]["acc,none"],
        ("embedded_sums_3shot_limit6", "exact_match_strict"): expected["embedded_sums"][
            "exact_match,strict-match"
        ],
        ("embedded_sums_3shot_limit6", "exact_match_flexible"): expected["embedded_sums"][
            "exact_match,flexible-extract"
        ],
    }
    for value in values.values():
        assert len(value.samples) == QUESTIONS
        assert set(value.samples) <= {0.0, 1.0}
        assert value.value == pytest.approx(sum(value.samples) / QUESTIONS)
        spread = value.value * (1 - value.value) / QUESTIONS
        assert value.stderr == pytest.approx(math.sqrt(spread))


def mmlu_folder(root: Path) -> Path:
    """Two subjects of MMLU, and a group of them as lm-eval's `mmlu_stem` has its own."""
    own = root / "own"
    own.mkdir()
    group = {
        "group": "stem",
        "task": [f"mmlu_{subject}" for subject in SUBJECTS],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
    (own / "stem.yaml").write_text(json.dumps(group))
    whole = {"group": "whole", "task": ["stem"], "metadata": {"version": 3}}
    (own / "whole.yaml").write_text(json.dumps(whole))
    return own


def test_values_and_details_of_tasks_and_groups(tmp_path: Path) -> None:
    context = surroundings(tmp_path)
    names = ["hellaswag", "whole", "gsm8k", "lambada_openai"]
    measure = Tasks(
        names,
        num_fewshot={"whole": 5, "gsm8k": 2},
        include=str(mmlu_folder(tmp_path)),
    )
    values = by_name(measure.run(engine(), context))
    assert context.problems == {}
    assert {key: len(value.samples) for key, value in values.items()} == {
        ("hellaswag_0shot", "acc"): 7,
        ("hellaswag_0shot", "acc_norm"): 7,
        ("mmlu_abstract_algebra_5shot", "acc"): 4,
        ("mmlu_anatomy_5shot", "acc"): 6,
        ("stem_5shot", "acc"): 10,
        ("gsm8k_2shot", "exact_match_strict"): 3,
        ("gsm8k_2shot", "exact_match_flexible"): 3,
        ("lambada_openai_0shot", "perplexity"): 5,
        ("lambada_openai_0shot", "acc"): 5,
    }
    perplexity = values["lambada_openai_0shot", "perplexity"]
    assert (perplexity.unit, perplexity.higher_is_better) == ("perplexity", False)
    assert perplexity.value == pytest.approx(math.exp(-sum(perplexity.samples) / 5))
    assert {v.unit for v in values.values() if v is not perplexity} == {"share"}
    parts = [values[f"mmlu_{subject}_5shot", "acc"] for subject in SUBJECTS]
    stem = values["stem_5shot", "acc"]
    assert stem.samples == (*parts[0].samples, *parts[1].samples)
    assert stem.value == pytest.approx(sum(stem.samples) / 10)
    details = context.details["tasks"]
    assert {name: (one["group"], one["count"]) for name, one in details.items()} == {
        "hellaswag": (None, 7),
        "mmlu_abstract_algebra": ("stem", 4),
        "mmlu_anatomy": ("stem", 6),
        "stem": ("whole", 10),
        "whole": (None, 10),
        "gsm8k": (None, 3),
        "lambada_openai": (None, 5),
    }
    asked = context.answers["acc", "stem_5shot"].questions
    assert details["stem"]["questions"] == hashlib.sha256("\n".join(asked).encode()).hexdigest()
    assert details["stem"]["metrics"] == ["acc"]
    assert {name: one["chance"] for name, one in details.items() if "chance" in one} == {
        name: 0.25 for name in details if name not in ("gsm8k", "lambada_openai")
    }
    assert details["whole"]["metrics"] == []
    assert (details["stem"]["num_fewshot"], details["stem"]["version"]) == (5, "2")
    answer = json.loads(context.answers["acc", "mmlu_anatomy_5shot"].answers[0])
    assert len(answer) == 4
    assert max(answer) < 0
    scored = values["mmlu_anatomy_5shot", "acc"].samples[0]
    assert scored == float(answer.index(max(answer)) == 0), "question 0 of the tests has answer A"
    written = json.loads(context.answers["exact_match_strict", "gsm8k_2shot"].answers[0])
    assert isinstance(written, str)


def test_limits_by_name_take_the_first_questions(tmp_path: Path) -> None:
    context = surroundings(tmp_path)
    own = str(mmlu_folder(tmp_path))
    limit = {"stem": 3, "mmlu_anatomy": 2}
    values = by_name(Tasks(["stem", "hellaswag"], limit=limit, include=own).run(engine(), context))
    assert {key[0]: len(value.samples) for key, value in values.items()} == {
        "mmlu_abstract_algebra_0shot_limit3": 3,
        "mmlu_anatomy_0shot_limit2": 2,
        "stem_0shot_limit2-3": 5,
        "hellaswag_0shot": 7,
    }
    again = surroundings(tmp_path / "again", tmp_path / "data")
    same = by_name(Tasks(["stem"], limit=2, include=own).run(engine(), again))
    name = "mmlu_anatomy_0shot_limit2"
    assert same[name, "acc"].samples == values[name, "acc"].samples
    assert again.answers["acc", name] == context.answers["acc", name]
    assert "stem_0shot_limit2" in {protocol for protocol, _ in same}
    whole = Tasks(["hellaswag"], limit=7).run(engine(), again)
    assert {value.protocol for value in whole} == {"hellaswag_0shot"}


def test_scores_that_are_no_numbers_leave_a_value_without_samples(tmp_path: Path) -> None:
    data = tmp_path / "data"
    pages = [{"page": f" = {n} = \n a text of {n} words ."} for n in range(3)]
    write(data / "wikitext_document_level/wikitext-2-raw-v1/test.jsonl", pages)
    context = surroundings(tmp_path, data)
    values = by_name(Tasks(["wikitext"]).run(engine(), context))
    units = {key[1]: (v.unit, v.samples, v.higher_is_better) for key, v in values.items()}
    assert units == {
        "word_perplexity": ("perplexity", (), False),
        "byte_perplexity": ("perplexity", (), False),
        "bits_per_byte": ("bit/B", (), False),
    }
    assert context.details["tasks"]["wikitext"]["count"] == 3


def test_own_tasks_bring_their_data_and_functions(tmp_path: Path) -> None:
    own = tmp_path / "own"
    write(own / "deep" / "asked.jsonl", [sums(n) for n in range(4)])
    (own / "deep" / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: asked.jsonl\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: question\n"
        "doc_to_target: answer\nprocess_results: !function scorer.score\n"
        "metric_list:\n  - metric: length\n    aggregation: mean\n    higher_is_better: true\n"
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 4\n"
    )
    (own / "deep" / "scorer.py").write_text(
        "def score(doc, results):\n    return {'length': len(doc['question'])}\n"
    )
    context = surroundings(tmp_path, tmp_path)
    values = by_name(Tasks(["mine"], include=str(own)).run(engine(), context))
    assert context.problems == {}
    length = values["mine_0shot", "length"]
    assert (length.unit, length.samples) == ("score", (38.0,) * 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tasks": ["hellaswag"], "limit": 8}, "limit is 8, but hellaswag has 7 questions"),
        (
            {"tasks": ["stem"], "limit": 5},
            "limit is 5, but mmlu_abstract_algebra, a part of stem, has 4 questions",
        ),
        (
            {"tasks": ["mathqa"]},
            r"mathqa cannot be loaded: data set regisss/math_qa is not in .*data\.tasks=FOLDER",
        ),
        (
            {"tasks": ["mmlu_astronomy"]},
            r"mmlu_astronomy cannot be loaded: .* neither a folder astronomy nor rows",
        ),
        (
            {"tasks": ["hellaswag"], "num_fewshot": 2},
            "num_fewshot is 2, but hellaswag has 0 worked examples in its data",
        ),
        (
            {"tasks": ["mmlu_anatomy"], "num_fewshot": 6},
            "num_fewshot is 6, but mmlu_anatomy has 5 worked examples",
        ),
    ],
)
def test_what_the_data_do_not_give_is_one_sentence_and_no_more(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    data = data_folder(tmp_path / "data")
    context = surroundings(tmp_path, data)
    own = mmlu_folder(tmp_path)
    asked = {**options, "tasks": [*options["tasks"], "gsm8k"]}
    for option in ("limit", "num_fewshot"):
        if option in options:
            asked[option] = {options["tasks"][0]: options[option]}
    values = Tasks(include=str(own), **asked).run(engine(), context)
    assert {value.protocol for value in values} == {"gsm8k_5shot"}
    (said,) = sentences(context)
    assert re.search(match, said), said


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data / "gsm8k/main/train.jsonl", [sums(n) for n in range(9)])
    context = surroundings(tmp_path, data)
    assert Tasks(["gsm8k"]).run(engine(), context) == []
    (said,) = sentences(context)
    assert said.startswith("gsm8k cannot be loaded: its data lack the split test")


def test_a_task_that_breaks_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    load = TaskManager.load

    def breaks(self: Any, names: list[str]) -> Any:
        if names == ["hellaswag"]:
            raise RuntimeError("something\nbroke")
        return load(self, names)

    monkeypatch.setattr(TaskManager, "load", breaks)
    context = surroundings(tmp_path)
    values = Tasks(["hellaswag", "lambada_openai"]).run(engine(), context)
    assert {value.protocol for value in values} == {"lambada_openai_0shot"}
    assert [str(error) for error in context.problems.values()] == ["something\nbroke"]


def model_with(folder: Path | None) -> Any:
    return cast(Any, SimpleNamespace(tokenizer_folder=lambda: folder))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tasks": ["helaswag"]}, "close to it are hellaswag"),
        ({"tasks": ["gsm8k", "gsm8k"]}, "tasks names gsm8k twice"),
        ({"tasks": ["mmlu", "mmlu_anatomy"]}, "mmlu_anatomy twice, in mmlu and in mmlu_anatomy"),
        ({"tasks": ["gsm8k"], "limit": {"gsm9k": 2}}, "limit: gsm9k is no task, .* gsm8k"),
        ({"tasks": ["humaneval"], "num_fewshot": 1}, "humaneval has no worked examples"),
        ({"tasks": ["lambada_openai"], "num_fewshot": 1}, "its definition names no split"),
        ({"tasks": ["humaneval_64"]}, "humaneval_64 asks for sampling"),
        ({"tasks": ["gsm8k"], "apply_chat_template": True}, "tokenizer has no chat template"),
        ({"tasks": ["gsm8k"], "include": "/nowhere/at/all"}, "there is no folder /nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        Tasks(**options).check(model_with(EMBEDDED), with_index(tmp_path))


def test_the_form_of_prompts_is_part_of_the_protocol(tmp_path: Path) -> None:
    context = surroundings(tmp_path)
    context.tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
    )
    plain = Tasks(["gsm8k"], limit=1, system_instruction="Be brief.")
    chat = Tasks(["gsm8k"], limit=1, apply_chat_template=True, fewshot_as_multiturn=True)
    names = [one.run(engine(), context)[0].protocol for one in (plain, chat)]
    assert re.fullmatch(r"gsm8k_5shot_system[0-9a-f]{6}_limit1", names[0])
    assert names[1] == "gsm8k_5shot_chat_multiturn_limit1"
    assert context.problems == {}


def test_what_can_work_is_not_refused(tmp_path: Path) -> None:
    names = ["hellaswag", "mmlu", "gsm8k", "humaneval", "lambada_openai", "embedded_sums"]
    Tasks(names, num_fewshot={"mmlu": 5}).check(model_with(None), with_index(tmp_path))
    Tasks(["gsm8k"], limit={"mmlu": 5}).check(model_with(None), with_index(tmp_path))
    Tasks(["gsm8k"], apply_chat_template=True).check(model_with(None), with_index(tmp_path))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"limit": 0}, "limit is 0; it must be 1 or more"),
        ({"limit": {"gsm8k": 0}}, "limit of gsm8k is 0"),
        ({"limit": 0.5}, r"limit is 0\.5"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"code_timeout_seconds": 0}, "code_timeout_seconds is 0"),
        ({"fewshot_as_multiturn": True}, "apply_chat_template must be true"),
    ],
)
def test_options_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Tasks(**options)


@pytest.mark.parametrize(
    ("capabilities", "measured", "noted"),
    [
        (frozenset({"logits"}), {"hellaswag_0shot"}, ["gsm8k not measured: .* cannot generate"]),
        (frozenset({"serve"}), set(), ["hellaswag not .* logits or logprobs", "gsm8k not"]),
    ],
)
def test_what_an_engine_cannot_give_is_a_note(
    tmp_path: Path, capabilities: frozenset[str], measured: set[str], noted: list[str]
) -> None:
    context = surroundings(tmp_path)
    values = Tasks(["hellaswag", "gsm8k"]).run(engine(capabilities), context)
    assert {value.protocol for value in values} == measured
    assert context.problems == {}
    for note, match in zip(context.details["notes"], noted, strict=True):
        assert re.search(match, note), note


def test_generated_code_runs_only_where_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_folder(tmp_path / "data")
    problems = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": "def one():\n",
            "entry_point": "one",
            "canonical_solution": "    return 1\n",
            "test": "def check(candidate):\n    assert candidate() == 1\n",
        }
        for number in range(2)
    ]
    write(data / "openai/openai_humaneval/test.jsonl", problems)
    ran: list[tuple[str, float]] = []

    def passes(programs: list[str], limits: Any, workers: int) -> list[tuple[bool, str]]:
        ran.extend((program, limits.seconds) for program in programs)
        return [(len(ran) % 2 == 0, "said") for _ in programs]

    monkeypatch.setattr(code_eval, "_run", passes)
    context = surroundings(tmp_path, data)
    context.tokenizer.model_max_length = 4096
    wide = BigramEngine(drawn_table(VOCABULARY), context_length=4096)
    assert Tasks(["humaneval"]).run(wide, context) == []
    assert "allow_code_execution=true" in context.details["notes"][0]
    assert ran == []
    measure = Tasks(["humaneval"], allow_code_execution=True, code_timeout_seconds=3)
    (value,) = measure.run(wide, context)
    assert context.problems == {}
    assert (value.metric, value.protocol, value.unit) == ("pass@1", "humaneval_0shot", "share")
    assert value.value == pytest.approx(sum(value.samples) / 2)
    assert sorted(value.samples) == [0.0, 1.0]
    assert {seconds for _, seconds in ran} == {3}
    tested = [program for program, _ in ran if program.endswith("check(one)")]
    assert len(tested) == 2
    assert all(program.startswith("def one():\n") for program in tested)


def test_stop_tokens_come_from_the_models_generation_config(tmp_path: Path) -> None:
    from harness.measures.tasks import _stop_ids

    assert _stop_ids(tmp_path) == []
    path = tmp_path / "generation_config.json"
    for text, ids in (
        ('{"eos_token_id": 5}', [5]),
        ('{"eos_token_id": [5, 6]}', [5, 6]),
        ("{}", []),
    ):
        path.write_text(text)
        assert _stop_ids(tmp_path) == ids
