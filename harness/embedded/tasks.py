"""The three lm-eval tasks of the embedded demonstration model, with paths that work anywhere.

Source: the shapes of lm-eval 0.4.13's `hellaswag`, `mmlu` and `gsm8k` tasks. The YAML files in the
folder `tasks` name their data relative to themselves; `embedded_tasks` makes the names absolute.
Hand the result to `lm_eval.simple_evaluate(tasks=..., task_manager=TaskManager(
include_defaults=False))`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent / "tasks"
NAMES = ("embedded_endings", "embedded_facts", "embedded_sums")


def embedded_tasks(names: tuple[str, ...] = NAMES) -> list[dict[str, Any]]:
    """Return the task configurations of `names`, data files absolute, as lm-eval takes them."""
    return [_task(name) for name in names]


def _task(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {
        split: str(FOLDER / file) for split, file in files.items()
    }
    return config
