"""Where task data lie in a folder, and what of them is part of a cell's key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.task_files import find_data_set, include_folder, splits_in, tree_digest
from harness.task_identity import task_identity
from kernels.errors import ConfigError
from tests.harness.task_folders import data_folder, hellaswag, mmlu, sums, with_index, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("file", "name", "subset"),
    [
        ("openai/gsm8k/main/test.jsonl", "openai/gsm8k", "main"),
        ("gsm8k/main/test.parquet", "openai/gsm8k", "main"),
        ("gsm8k/main/test-00000-of-00001.parquet", "openai/gsm8k", "main"),
        ("a/b/test.jsonl.gz", "a/b", None),
        ("a/b/test.jsonl.gz", "a/b", "default"),
        ("a/b/default/test.json.gz", "a/b", None),
        ("a/b/data/test-00000-of-00001.parquet", "a/b", None),
    ],
)
def test_a_data_set_is_found_where_the_hub_would_have_it(
    tmp_path: Path, file: str, name: str, subset: str | None
) -> None:
    write(tmp_path / file, [sums(1)])
    found = find_data_set(tmp_path, name, subset)
    assert found is not None
    assert dict(found.splits) == {"test": (tmp_path / file,)}
    assert found.column_value is None
    assert find_data_set(tmp_path, "another/one", subset) is None


def test_a_subset_without_a_folder_is_a_value_of_a_column(tmp_path: Path) -> None:
    write(tmp_path / "cais/mmlu/dev.jsonl", [mmlu("anatomy", 1)])
    write(tmp_path / "cais/mmlu/README.md", [])
    found = find_data_set(tmp_path, "cais/mmlu", "anatomy")
    assert found is not None
    assert found.column_value == "anatomy"
    assert list(found.splits) == ["dev"]


def test_shards_are_one_split(tmp_path: Path) -> None:
    for shard in range(2):
        write(tmp_path / f"train-{shard:05}-of-00002.parquet", [sums(shard)])
    write(tmp_path / "auxiliary_train.jsonl", [sums(1)])
    found = splits_in(tmp_path)
    assert {name: len(files) for name, files in found.items()} == {"auxiliary_train": 1, "train": 2}


def test_the_digest_of_a_folder_is_of_all_its_files_and_their_places(tmp_path: Path) -> None:
    folder, digests = tmp_path / "own", tmp_path / "digests.json"
    write(folder / "a" / "x.yaml", [{"a": 1}])
    write(folder / "b" / "x.yaml", [{"b": 1}])
    before = tree_digest(folder, digests)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("compiled")
    (folder / ".hidden").write_text("an editor's")
    assert tree_digest(folder, digests) == before
    (folder / "a" / "x.yaml").rename(folder / "b" / "y.yaml")
    assert tree_digest(folder, digests) != before


def test_an_include_folder_has_to_be_there(tmp_path: Path) -> None:
    assert include_folder(None) is None
    assert include_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match=r"include is .*absent, but there is no folder"):
        include_folder(str(tmp_path / "absent"))


def nodes(*names: str, **options: Any) -> list[dict[str, Any]]:
    return [{"_target_": "a.Perplexity"}, {"tasks": list(names), **options}]


def test_task_data_count_by_the_data_sets_that_are_used(tmp_path: Path) -> None:
    data, cache = data_folder(tmp_path / "data"), with_index(tmp_path / "cache")
    asked = nodes("hellaswag", "mmlu_anatomy", "mathqa")
    before = task_identity(asked, data, cache)
    assert before[0]["data"]["regisss/math_qa None"] is None
    assert set(before[0]["data"]["cais/mmlu anatomy"]) == {"dev", "test"}
    write(data / "gsm8k/main/test.jsonl", [sums(8)])
    assert task_identity(asked, data, cache) == before
    moved = data.rename(tmp_path / "moved")
    assert task_identity(asked, moved, cache) == before
    write(moved / "Rowan/hellaswag/validation.jsonl.gz", [hellaswag(8)])
    assert task_identity(asked, moved, cache) != before


def test_what_is_known_otherwise_is_no_part_of_the_identity(tmp_path: Path) -> None:
    embedded = nodes("embedded_endings", "embedded_sums")
    assert task_identity([], tmp_path, tmp_path) == []
    assert task_identity(nodes()[:1], tmp_path, tmp_path) == []
    assert task_identity(embedded, tmp_path, tmp_path) == []
    assert task_identity(nodes("hellaswag"), None, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_own_definitions_and_the_data_they_name_count(tmp_path: Path) -> None:
    own, outside = tmp_path / "own", tmp_path / "outside.jsonl"
    write(outside, [sums(1)])
    definition = f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files: {outside}\n"
    own.mkdir()
    (own / "mine.yaml").write_text(definition)
    found = []
    for change in (None, lambda: write(outside, [sums(2)]), lambda: (own / "u.py").write_text("")):
        if change is not None:
            change()
        found.append(json.dumps(task_identity(nodes("mine", include=str(own)), None, tmp_path)))
    assert len(set(found)) == 3


def test_what_is_remembered_needs_neither_lm_eval_nor_torch(tmp_path: Path) -> None:
    data, cache = data_folder(tmp_path / "data"), with_index(tmp_path / "cache")
    expected = task_identity(nodes("gsm8k"), data, cache)
    code = (
        "import sys; from pathlib import Path; from harness.task_identity import task_identity\n"
        f"data, cache = Path({str(data)!r}), Path({str(cache)!r})\n"
        "found = task_identity([{'tasks': ['gsm8k']}], data, cache)\n"
        f"assert found == {expected!r}\n"
        "print([name for name in ('torch', 'lm_eval', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
