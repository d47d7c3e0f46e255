"""How rows are cut into batches; what is read is compared in `test_lm_eval_model`."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from harness.measures.reading import batches


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


def test_nothing_is_no_batch() -> None:
    assert list(batches(0, 4, lambda i, j: 1)) == []
