"""What names of tasks stand for: as lm-eval resolves them, remembered, without their data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import task_index
from harness.embedded.tasks import NAMES
from harness.remembered import recall
from harness.task_index import defaults_file, parts_of, registry_of
from kernels.errors import ConfigError
from tests.harness.task_folders import with_index


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return with_index(tmp_path / "cache")


def test_tasks_are_described_as_their_definitions_have_them(cache: Path) -> None:
    names = ["hellaswag", "gsm8k", "humaneval", "lambada_openai", "humaneval_64"]
    swag, gsm, human, lambada, sampled = parts_of(names, None, cache)
    assert (swag.dataset, swag.subset, swag.output_type) == (
        "Rowan/hellaswag",
        None,
        "multiple_choice",
    )
    assert (gsm.subset, gsm.num_fewshot, gsm.output_type) == ("main", 5, "generate_until")
    assert [part.runs_code for part in (swag, gsm, human, lambada)] == [False, False, True, False]
    assert [part.has_examples for part in (swag, gsm, lambada)] == [True, True, False]
    assert [part.samples for part in (gsm, human, sampled)] == [False, False, True]


def test_groups_and_tags_stand_for_their_tasks(cache: Path) -> None:
    parts = parts_of(["mmlu", "lambada"], None, cache)
    mmlu = [part for part in parts if part.asked == "mmlu"]
    assert len(mmlu) == 57
    anatomy = next(part for part in mmlu if part.task == "mmlu_anatomy")
    assert anatomy.names == ("mmlu", "mmlu_stem", "mmlu_anatomy")
    assert (anatomy.dataset, anatomy.subset) == ("cais/mmlu", "anatomy")
    assert [part.names for part in parts if part.asked == "lambada"] == [
        ("lambada", "lambada_openai"),
        ("lambada", "lambada_standard"),
    ]


def test_a_second_question_is_answered_from_the_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(["mmlu"], None, cache)

    def no_index(*arguments: Any) -> Any:
        raise AssertionError("the index was asked again")

    monkeypatch.setattr(task_index, "_entries", no_index)
    assert parts_of(["mmlu"], None, cache) == parts


def test_a_damaged_memory_is_made_again(cache: Path) -> None:
    parts = parts_of(["hellaswag"], None, cache)
    for path in (cache / "tasks").glob("[0-9a-f]*.json"):
        path.write_text("{")
    assert parts_of(["hellaswag"], None, cache) == parts


def test_lm_evals_whole_index_is_made_where_none_is_remembered(tmp_path: Path) -> None:
    (part,) = parts_of(["arc_easy"], None, tmp_path)
    assert part.dataset == "allenai/ai2_arc"
    names = recall(defaults_file(tmp_path))
    assert len(names) > 10_000
    assert names["mmlu"] == ["GROUP", "mmlu/default/_mmlu.yaml", []]
    assert names["lambada"] == ["TAG", None, ["lambada_openai", "lambada_standard"]]


def test_an_unknown_name_is_refused_with_those_that_are_close(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"helaswag is no task, .* close to it are hellaswag"):
        parts_of(["helaswag"], None, cache)


def test_a_definition_that_lm_eval_refuses_is_one_sentence(cache: Path) -> None:
    with pytest.raises(ConfigError, match="the definition of t0_eval cannot be read"):
        parts_of(["t0_eval"], None, cache)


def test_embedded_tasks_need_no_index(tmp_path: Path) -> None:
    parts = parts_of(NAMES, None, tmp_path)
    assert [part.task for part in parts] == list(NAMES)
    assert all(Path(name).is_file() for part in parts for name in part.files)
    assert not list((tmp_path / "tasks").glob("index-*"))


def definition(folder: Path, name: str, **fields: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"task": name, "dataset_path": "json", "output_type": "multiple_choice", **fields}
    (folder / f"{name}.yaml").write_text(json.dumps(content))


def test_own_definitions_come_before_lm_evals(tmp_path: Path) -> None:
    own = tmp_path / "own"
    definition(own, "hellaswag", num_fewshot=3)
    (part,) = parts_of(["hellaswag"], own, tmp_path)
    assert (part.dataset, part.num_fewshot) == ("json", 3)
    definition(own, "hellaswag", num_fewshot=4)
    (part,) = parts_of(["hellaswag"], own, tmp_path)
    assert part.num_fewshot == 4, "a changed folder is read again"


def test_data_beside_a_definition_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    files = {"test": "q.jsonl", "dev": ["missing.jsonl"]}
    definition(own / "deep", "mine", dataset_kwargs={"data_files": files})
    (own / "deep" / "q.jsonl").write_text("{}\n")
    monkeypatch.chdir("/")
    parts = parts_of(["mine"], own, tmp_path)
    assert parts[0].files == (str(own / "deep" / "q.jsonl"),)
    entry = registry_of(["mine"], parts, own, tmp_path)["mine"]
    assert entry.cfg["dataset_kwargs"]["data_files"] == {
        "test": str(own / "deep" / "q.jsonl"),
        "dev": ["missing.jsonl"],
    }


def test_a_group_changes_its_members_as_lm_eval_does(cache: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    definition(own, "mine", num_fewshot=1)
    group = {
        "group": "ours",
        "task": [
            "mine",
            {"task": "hellaswag", "num_fewshot": 7},
            {"group": "inner", "task": [{"task": "fresh", "dataset_path": "a/b"}]},
        ],
    }
    (own / "group.yaml").write_text(json.dumps(group))
    parts = parts_of(["ours"], own, cache)
    assert [(part.names, part.dataset, part.num_fewshot) for part in parts] == [
        (("ours", "mine"), "json", 1),
        (("ours", "hellaswag"), "Rowan/hellaswag", 7),
        (("ours", "ours::inner", "ours::inner::fresh"), "a/b", None),
    ]
