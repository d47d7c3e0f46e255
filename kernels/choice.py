"""From how many tokens on a dequantized panel and torch's own GEMM beat the C kernels: measured.

The C kernels multiply about as fast as the library where both use the same instructions; on a
processor with a matrix unit, or without what the kernels are written for, the library is ahead for
many tokens. So both are timed once per shape, on `ROWS` of its rows and random numbers, and the
result is kept beside the compiled kernels, one JSON file a shape.

The library rounds the weights to the type of the activations, and its sums may depend on how many
tokens there are: it is only taken where it is clearly ahead.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import host_build, host_linear
from kernels.compiler import cache_folder
from kernels.host_linear import Matrix
from kernels.panels import UNIT_ROWS

VERSION = 1
"""Raise when what is measured, or a file's format, changes."""

TOKENS = (16, 64, 256, 1024)
ROWS = 512
"""Of a matrix that are timed, and that are dequantized at once where the library multiplies."""

LEAST_WEIGHTS = 1 << 20
"""Smaller matrices stay with the C kernels: what is left of their time is calls."""

REPEATS, CONFIRMED = 3, 8
"""How often both are timed; more often where the library seems to be ahead."""

MARGIN = 0.95
"""The library has to take less than this share of the C kernels' time."""


def through_library(matrix: Matrix, x: Tensor) -> Tensor:
    """Return [tokens, rows] in the type of x (bfloat16 or float32) [tokens, columns]."""
    y = x.new_empty(x.shape[0], matrix.rows)
    for start in range(0, matrix.rows, ROWS):
        end = min(start + ROWS, matrix.rows)
        weight = host_linear.dequantize_rows(matrix, start, end, x.dtype)[: matrix.columns]
        y[:, start:end] = x @ weight
    return y


def library_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type the library computes in: float16 is emulated on a processor."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def choose(matrix: Matrix, dtype: torch.dtype) -> dict[str, Any]:
    """Return the choice for activations of `dtype` on torch's threads, as JSON facts.

    `library_from` is the least number of tokens from which the library multiplies, None for never;
    `seconds` has tokens -> [C kernels, library] for `rows` of the rows; nothing where the matrix is
    small.
    """
    facts = {
        "version": VERSION,
        "bits": matrix.kind,
        "group": matrix.group,
        "zero_points": matrix.zero is not None,
        "rows": matrix.rows,
        "columns": matrix.columns,
        "dtype": str(library_type(dtype)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": hashlib.sha256(host_build.cpu_features().encode()).hexdigest()[:16],
        "torch": torch.__version__,
        "kernels": host_build.sources_digest(),
    }
    if matrix.rows * matrix.columns < LEAST_WEIGHTS:
        return {**facts, "library_from": None, "seconds": {}}
    # A shape of another layer is the same measurement, so only its facts are the key.
    text = json.dumps(facts, sort_keys=True)
    folder = str(cache_folder())
    if (folder, text) not in _chosen():
        path = Path(folder) / f"choice-{hashlib.sha256(text.encode()).hexdigest()}.json"
        _chosen()[folder, text] = _read(path, facts) or _measured(path, facts, matrix, dtype)
    return _chosen()[folder, text]


@cache
def _chosen() -> dict[tuple[str, str], dict[str, Any]]:
    """Return what this process has read or measured."""
    return {}


def _read(path: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Return what is kept, None where there is nothing or something damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and {"library_from", "seconds"} <= set(found)
    return found if whole and facts.items() <= found.items() else None


def _measured(
    path: Path, facts: dict[str, Any], matrix: Matrix, dtype: torch.dtype
) -> dict[str, Any]:
    part = Matrix.from_buffer_copy(matrix)
    part.rows = min(ROWS, matrix.rows // UNIT_ROWS * UNIT_ROWS)
    seconds = {str(tokens): _seconds(part, tokens, dtype) for tokens in TOKENS}
    found = {**facts, "library_from": _first(seconds), "timed_rows": part.rows, "seconds": seconds}
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(found, file)
        Path(file.name).replace(path)
    except OSError:
        # Only time is lost: the next process measures again.
        return found
    return found


def _first(seconds: dict[str, list[float]]) -> int | None:
    """Return the least number of tokens from which the library is ahead at every one measured."""
    first = None
    for tokens in reversed(TOKENS):
        ours, library = seconds[str(tokens)]
        if library >= MARGIN * ours:
            break
        first = tokens
    return first


def _seconds(part: Matrix, tokens: int, dtype: torch.dtype) -> list[float]:
    """Return the least times of both ways, taken in turn."""
    x = torch.ones(tokens, part.columns, dtype=library_type(dtype))
    ways: list[Callable[[], Tensor]] = [
        lambda: host_linear.multiply(part, x),
        lambda: through_library(part, x),
    ]
    times: list[list[float]] = [[], []]
    for repeat in range(CONFIRMED):
        if repeat >= REPEATS and min(times[1]) >= MARGIN * min(times[0]):
            break
        for way, taken in zip(ways, times, strict=True):
            begin = time.perf_counter()
            way()
            taken.append(time.perf_counter() - begin)
    return [min(taken) for taken in times]
