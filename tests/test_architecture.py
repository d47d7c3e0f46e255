"""What must stay free of heavy imports, and what an import must not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "pandas", "matplotlib", "lm_eval", "datasets")


def loaded_after(statement: str, names: tuple[str, ...]) -> list[str]:
    code = f"import sys; {statement}; print([n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [name for name in names if repr(name) in done.stdout]


@pytest.mark.parametrize(
    "module",
    ["run", "harness.jobs", "harness.cell", "harness.sweep", "harness.models", "harness.record"],
)
def test_the_driver_is_free_of_torch(module: str) -> None:
    assert loaded_after(f"import {module}", HEAVY) == []


def test_reports_are_free_of_torch() -> None:
    statement = (
        "import reports.render, reports.table, reports.closing, "
        "reports.drawing.plots, reports.recommend.command, reports.diff.command, "
        "reports.track"
    )
    assert loaded_after(statement, ("torch", "transformers")) == []


def test_importing_everything_touches_no_cuda_and_starts_no_thread() -> None:
    methods = ", ".join(f"methods.{path.stem}" for path in (ROOT / "methods").glob("[a-z]*.py"))
    statement = (
        f"import threading, harness.preload, {methods}, torch; "
        "assert not torch.cuda.is_initialized(); assert threading.active_count() == 1"
    )
    # What a method calls is imported by the child of a cell that uses it.
    libraries = ("auto_round", "gptqmodel", "llmcompressor")
    assert loaded_after(statement, ("torch", *libraries)) == ["torch"]
