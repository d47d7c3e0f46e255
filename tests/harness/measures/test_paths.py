"""The packed path is held against the dequantized one, and a difference is no small matter."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from harness.context import Context
from harness.measures.paths import Paths
from kernels.errors import ConfigError
from methods.base import Engine
from methods.packed import PathDisagreementError
from tests.harness.measures.surroundings import (
    BigramEngine,
    by_metric,
    drawn_ids,
    make_context,
)

TABLE = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))


def context_with(folder: Path, other: torch.Tensor | None) -> Context:
    context = make_context(folder, drawn_ids(200, 16))
    if other is not None:
        engine = cast(Engine, BigramEngine(other))
        context.dequantized = lambda: (engine, 0.05)
    return context


def test_equal_paths_differ_by_nothing(tmp_path: Path) -> None:
    found = by_metric(Paths().run(cast(Engine, BigramEngine(TABLE)), context_with(tmp_path, TABLE)))
    assert found["path_difference_prefill"].value == 0
    assert found["path_difference_decode"].value == 0


def test_a_difference_within_the_tolerance_is_recorded(tmp_path: Path) -> None:
    context = context_with(tmp_path, TABLE * 1.01)
    found = by_metric(Paths().run(cast(Engine, BigramEngine(TABLE)), context))
    assert 0.005 < found["path_difference_decode"].value < 0.02
    assert context.details["paths"] == {"tolerance": 0.05, "tokens": 64}


def test_a_disagreement_is_an_error_that_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(PathDisagreementError, match="prefill: logits of the packed"):
        Paths().run(cast(Engine, BigramEngine(TABLE)), context_with(tmp_path, TABLE.flip(1)))


def test_a_method_with_one_path_has_nothing_to_compare(tmp_path: Path) -> None:
    assert Paths().run(cast(Engine, BigramEngine(TABLE)), context_with(tmp_path, None)) == []


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be above 4"):
        Paths(tokens=4)
