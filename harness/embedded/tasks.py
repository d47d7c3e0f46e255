"""The three lm-eval tasks of the embedded demonstration model: YAML files and their data.

Source: the shapes of lm-eval 0.4.13's `hellaswag`, `mmlu` and `gsm8k` tasks. The YAML files name
their data relative to themselves; `harness.task_index` makes such names absolute.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "tasks"
NAMES = ("embedded_endings", "embedded_facts", "embedded_sums")
