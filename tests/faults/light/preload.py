"""In the place of `harness.preload`: what `tests/faults/child.py` needs."""

from __future__ import annotations

import joblib  # type: ignore[import-untyped]  # noqa: F401  # start method of its workers

import harness.cache  # noqa: F401


def limit_threads(threads: int) -> None:
    """Nothing is computed here."""
