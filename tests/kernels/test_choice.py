"""The choice between the C kernels and the library: measured once, kept, and followed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import choice, host_build, host_linear
from kernels.cpu import PanelLinear
from tests.kernels.test_aten import inputs, stored

pytestmark = pytest.mark.skipif(
    bool(host_build.unavailable()), reason=f"no C kernels: {host_build.unavailable()}"
)

SLOW, FAST = [2.0, 1.0], [1.0, 2.0]
"""Seconds of the C kernels and of the library: where they are slower, and where faster."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The compiled library stays where it is.
    monkeypatch.setattr(choice, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(choice, "LEAST_WEIGHTS", 0)
    return tmp_path


def linear(bits: int = 4) -> PanelLinear:
    return PanelLinear(stored(bits, 150, 96, 32, symmetric=False))


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, list[float]]) -> list[int]:
    """Give these seconds instead of measured ones; return where the tokens asked for appear."""
    asked: list[int] = []

    def found(part: object, tokens: int, dtype: torch.dtype) -> list[float]:
        asked.append(tokens)
        return seconds.get(tokens, FAST)

    monkeypatch.setattr(choice, "_seconds", found)
    return asked


@pytest.mark.parametrize(
    ("slow", "expected"),
    [((), None), ((1024,), 1024), ((256, 1024), 256), ((16,), None), ((16, 64, 256, 1024), 16)],
)
def test_the_library_takes_over_where_it_stays_ahead(
    slow: tuple[int, ...], expected: int | None, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    asked = timed(monkeypatch, dict.fromkeys(slow, SLOW))
    module = linear()
    module.choose(torch.float32)
    assert module.choice["library_from"] == expected
    assert asked == list(choice.TOKENS)
    assert module.choice["dtype"] == "float32"


def test_a_narrow_lead_changes_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    timed(monkeypatch, {tokens: [1.0, 0.96] for tokens in choice.TOKENS})
    module = linear()
    module.choose(torch.float32)
    assert module.choice["library_from"] is None


def test_it_is_measured_once_and_read_again(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    asked = timed(monkeypatch, {1024: SLOW})
    first, second = linear(), linear()
    first.choose(torch.float32)
    second.choose(torch.float32)
    assert first.choice == second.choice
    assert len(asked) == len(choice.TOKENS)
    choice._chosen.cache_clear()  # as another process
    second.choose(torch.float32)
    assert first.choice == second.choice
    assert len(asked) == len(choice.TOKENS)
    first.choose(torch.bfloat16)
    assert len(asked) == 2 * len(choice.TOKENS), "another type is another measurement"


@pytest.mark.parametrize("damaged", ["", "{}", "[]", '{"version": 0}', "\xff"])
def test_a_damaged_file_is_measured_again(
    damaged: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    asked = timed(monkeypatch, {1024: SLOW})
    linear().choose(torch.float32)
    (file,) = cache.glob("choice-*.json")
    file.write_bytes(damaged.encode("latin-1"))
    choice._chosen.cache_clear()
    module = linear()
    module.choose(torch.float32)
    assert module.choice["library_from"] == 1024
    assert len(asked) == 2 * len(choice.TOKENS)


def test_small_matrices_are_not_timed(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    asked = timed(monkeypatch, {})
    monkeypatch.setattr(choice, "LEAST_WEIGHTS", 150 * 96 + 1)
    module = linear()
    module.choose(torch.float32)
    assert (module.choice["library_from"], module.choice["seconds"], asked) == (None, {}, [])


def test_what_is_measured_are_seconds_of_both(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(choice, "TOKENS", (2,))
    module = linear()
    module.choose(torch.float32)
    (pair,) = module.choice["seconds"].values()
    assert all(0 < seconds < 10 for seconds in pair)


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 1e-3}
"""Of the largest output: weights are rounded to the type the library computes in."""


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 150)])
def test_both_ways_give_the_same(
    bits: int, dtype: torch.dtype, bias: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "ROWS", 64)
    module = linear(bits)
    x = inputs((5, 7), 96, dtype)
    ours = module(x, bias)
    module.choice = {"library_from": 36}
    assert torch.equal(module(x, bias), ours), "35 tokens are fewer"
    module.choice = {"library_from": 35}
    calls: list[int] = []
    whole = host_linear.dequantize_rows

    def counted(*given: object) -> Tensor:
        calls.append(1)
        return whole(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(host_linear, "dequantize_rows", counted)
    library = module(x, bias)
    assert len(calls) == 3, "150 rows in panels of 64"
    assert library.dtype == dtype
    error = (library.double() - ours.double()).abs().max() / ours.double().abs().max()
    assert error < TOLERANCE[dtype]
