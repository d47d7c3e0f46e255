"""Data sets of a folder as `datasets.load_dataset` gives those of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from harness.cache import Cache
from harness.measures import task_data
from harness.measures.task_data import data_from
from kernels.errors import ConfigError
from tests.harness.task_folders import data_folder, hellaswag, mmlu, sums, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return data_folder(tmp_path / "data")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_rows_and_columns_are_the_files_own(folder: Path, cache: Cache) -> None:
    with data_from(folder, cache):
        found = datasets.load_dataset("Rowan/hellaswag", None)
        shards = datasets.load_dataset(path="openai/gsm8k", name="main")
        one = datasets.load_dataset("gsm8k", "main", split="test")
    assert isinstance(found, datasets.DatasetDict)
    assert list(found["validation"]) == [hellaswag(number) for number in range(7)]
    assert {split: len(rows) for split, rows in shards.items()} == {"test": 3, "train": 9}
    assert list(one) == [sums(number) for number in range(3)]


def test_a_subset_may_be_a_value_of_a_column(folder: Path, cache: Cache) -> None:
    with data_from(folder, cache):
        found = datasets.load_dataset("cais/mmlu", "anatomy")
        with pytest.raises(ConfigError, match="rows with 'astronomy' in a column subject"):
            datasets.load_dataset("cais/mmlu", "astronomy")
    assert list(found["test"]) == [mmlu("anatomy", number) for number in range(6)]
    assert len(found["dev"]) == 5


def test_a_split_that_is_not_there_is_empty_and_remembered(folder: Path, cache: Cache) -> None:
    with data_from(folder, cache) as data:
        found = datasets.load_dataset("Rowan/hellaswag")
        assert list(found["train"]) == []
        assert found["train"].column_names == found["validation"].column_names
        assert set(data.absent) == {"train"}
        assert list(found) == ["validation"]


def many(row: dict[str, Any]) -> dict[str, Any]:
    return {"many": len(row["endings"])}


def test_a_file_is_read_once_and_what_is_derived_is_kept(
    folder: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def derived() -> Any:
        with data_from(folder, cache):
            rows = datasets.load_dataset("Rowan/hellaswag")["validation"]
        return rows.map(many)

    def kept() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in (cache.folder / "task_data").iterdir()}

    assert derived()["many"] == [4] * 7
    files = kept()
    assert len(files) == 2, "the rows, and what was made of them"
    monkeypatch.setattr(task_data, "_table", lambda files: pytest.fail("read again"))
    assert derived()["many"] == [4] * 7
    assert kept() == files
    monkeypatch.undo()
    write(folder / "Rowan/hellaswag/validation.jsonl.gz", [hellaswag(1)])
    assert derived()["many"] == [4]


def test_columns_that_only_some_rows_have_are_kept(tmp_path: Path, cache: Cache) -> None:
    write(tmp_path / "a/b/test.jsonl", [{"x": 1}, {"x": 2, "y": ["z"]}])
    with data_from(tmp_path, cache):
        rows = datasets.load_dataset("a/b")["test"]
    assert list(rows) == [{"x": 1, "y": None}, {"x": 2, "y": ["z"]}]


def test_what_cannot_be_a_table_is_one_sentence(tmp_path: Path, cache: Cache) -> None:
    write(tmp_path / "a/b/test.jsonl", [{"x": 1}, {"x": "one"}])
    with (
        data_from(tmp_path, cache),
        pytest.raises(ConfigError, match=r"test\.jsonl cannot be read"),
    ):
        datasets.load_dataset("a/b")


def test_files_named_by_a_task_are_read_by_the_library(tmp_path: Path, cache: Cache) -> None:
    write(tmp_path / "own.jsonl", [sums(1)])
    files = {"test": str(tmp_path / "own.jsonl")}
    with data_from(tmp_path / "data", cache):
        found = datasets.load_dataset("json", None, data_files=files)
        with pytest.raises(ConfigError, match="data set json cannot be fetched"):
            datasets.load_dataset("json", data_files={"test": str(tmp_path / "absent.jsonl")})
    assert list(found["test"]) == [sums(1)]
    assert (cache.folder / "datasets").is_dir()


def test_an_absent_data_set_names_the_place_it_belongs_to(folder: Path, cache: Cache) -> None:
    match = r"a/b/c is not in .*; put it there as a/b/c/SPLIT\.parquet .*data\.tasks=FOLDER"
    with data_from(folder, cache), pytest.raises(ConfigError, match=match):
        datasets.load_dataset("a/b", "c")


def test_a_hub_that_cannot_be_reached_says_what_to_do(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    match = r"a/not_here cannot be fetched .*data\.tasks=FOLDER"
    with data_from(None, cache), pytest.raises(ConfigError, match=match):
        datasets.load_dataset("a/not_here")


def test_the_library_is_put_back(folder: Path, cache: Cache) -> None:
    original = datasets.load_dataset
    with data_from(folder, cache):
        assert datasets.load_dataset is not original
    assert datasets.load_dataset is original
    with pytest.raises(ConfigError), data_from(folder, cache):
        datasets.load_dataset("a/b")
    assert datasets.load_dataset is original
