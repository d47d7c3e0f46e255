"""Small data sets with the hub's names and columns, and an index of the lm-eval tasks of tests."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.remembered import remember
from harness.task_index import defaults_file, indexed

FOLDERS = (
    "benchmarks",
    "gsm8k",
    "hellaswag",
    "humaneval",
    "lambada",
    "mathqa",
    "mmlu/default",
    "wikitext",
)
SUBJECTS = {"abstract_algebra": 4, "anatomy": 6}


@cache
def _index() -> Any:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return indexed([root / folder for folder in FOLDERS], root)


def with_index(cache_folder: Path) -> Path:
    """Let `cache_folder` remember an index of FOLDERS, which takes no 8 seconds, and return it."""
    remember(defaults_file(cache_folder), _index())
    return cache_folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def hellaswag(number: int) -> dict[str, Any]:
    endings = [f"eats {count} apples." for count in range(number, number + 4)]
    return {
        "ind": number,
        "activity_label": "Eating",
        "ctx_a": f"A man has {number} apples. he",
        "ctx_b": "",
        "ctx": f"A man has {number} apples. he",
        "endings": endings,
        "label": str(number % 4),
        "split": "val",
    }


def mmlu(subject: str, number: int) -> dict[str, Any]:
    choices = [str(number + step) for step in range(4)]
    asked = f"What is {number} of {subject}?"
    return {"question": asked, "subject": subject, "choices": choices, "answer": number % 4}


def sums(number: int) -> dict[str, str]:
    asked = f"Ann has {number} nuts and gets one. How many?"
    return {"question": asked, "answer": f"{number} + 1.\n#### {number + 1}"}


def data_folder(root: Path) -> Path:
    """Fill `root`: HellaSwag without a training split, MMLU in one file for two subjects, ..."""
    write(root / "Rowan/hellaswag/validation.jsonl.gz", [hellaswag(n) for n in range(7)])
    for split, factor in (("test", 1), ("dev", 0)):
        rows = [mmlu(s, n) for s, many in SUBJECTS.items() for n in range(many if factor else 5)]
        write(root / f"cais/mmlu/{split}.jsonl", rows)
    write(root / "gsm8k/main/test-00000-of-00001.parquet", [sums(n) for n in range(3)])
    write(root / "gsm8k/main/train.jsonl", [sums(n) for n in range(10, 19)])
    texts = [{"text": f"Bo took {n} maps and gave them to Bo"} for n in range(5)]
    write(root / "EleutherAI/lambada_openai/default/test.jsonl", texts)
    return root
