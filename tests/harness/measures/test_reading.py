"""How rows are cut into batches; what is read is compared in `test_lm_eval_model`."""

from __future__ import annotations

from itertools import product
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.measures import reading
from harness.measures.reading import batches
from harness.measures.shared_prefix import Row


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 4), st.integers(0, 30))
def test_no_other_cut_is_cheaper(lengths: list[int], most: int, overhead: int) -> None:
    lengths = sorted(lengths, reverse=True)

    def cost(i: int, j: int) -> int:
        return (j - i) * lengths[i] + overhead

    found = list(batches(len(lengths), most, cost))
    assert [place for run in found for place in range(*run)] == list(range(len(lengths)))
    assert all(0 < j - i <= most for i, j in found)
    sums = []
    for cuts in product([False, True], repeat=len(lengths) - 1):
        starts = [0, *(place + 1 for place, cut in enumerate(cuts) if cut)]
        runs = list(zip(starts, [*starts[1:], len(lengths)], strict=True))
        if all(j - i <= most for i, j in runs):
            sums.append(sum(cost(i, j) for i, j in runs))
    assert sum(cost(i, j) for i, j in found) == min(sums)


class Recorder:
    """Remembers how many logits each forward is asked for."""

    capabilities = frozenset({"logits", "cache"})
    vocab_size = 10

    def __init__(self) -> None:
        self.logits: list[int] = []

    def prefill(
        self, input_ids: Tensor, cache: Any = None, last: int | None = None
    ) -> tuple[Tensor, Any]:
        assert last is not None
        self.logits.append(len(input_ids) * last)
        return torch.zeros(len(input_ids), last, self.vocab_size), None


def test_the_logits_of_a_batch_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows of unlike length, which a large overhead would read together: 40 rows of logits fit.
    monkeypatch.setattr(reading, "LOGITS_BYTES", 40 * 10 * 4)
    rows = [Row(tuple(range(length)), length - 2) for length in range(10, 60, 5)]
    engine = Recorder()
    found = dict(reading.RowReader(cast(Any, engine), 8, overhead=500).logits(rows))
    assert {index: len(logits) for index, logits in found.items()} == dict.fromkeys(range(10), 2)
    assert max(engine.logits) <= 40
    assert len(engine.logits) < len(rows)


def test_nothing_is_no_batch() -> None:
    assert list(batches(0, 4, lambda i, j: 1)) == []
