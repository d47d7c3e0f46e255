"""The tree of shared beginnings."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from harness.measures.shared_prefix import WORTH, Node, Row, shared_beginnings

OVERHEAD = 16


def nodes_of(root: Node) -> list[Node]:
    return [root, *(found for child in root.children for found in nodes_of(child))]


def check(rows: list[Row]) -> Node:
    """Every row is one leaf, and every beginning is shareable by all rows below it."""
    root = shared_beginnings(rows, OVERHEAD)
    leaves = [leaf for node in nodes_of(root) for leaf in node.leaves]
    assert sorted(leaves) == list(range(len(rows)))
    for node in nodes_of(root):
        for below in nodes_of(node):
            for leaf in below.leaves:
                assert rows[leaf].tokens[: node.end] == rows[node.row].tokens[: node.end]
                assert node.end <= rows[leaf].shareable
        assert all(child.end > node.end for child in node.children)
    return root


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_rows(data: st.DataObject) -> None:
    beginnings = data.draw(
        st.lists(st.lists(st.integers(0, 1), max_size=60), min_size=1, max_size=4)
    )
    rows = []
    for _ in range(data.draw(st.integers(1, 12))):
        start = data.draw(st.sampled_from(beginnings))
        tokens = (*start, *data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=30)))
        rows.append(Row(tokens, data.draw(st.integers(0, len(tokens) - 1))))
    check(rows)


def test_shots_and_questions_are_two_levels() -> None:
    drawn = random.Random(0)
    shots = [drawn.randrange(100) for _ in range(200)]
    rows = []
    for _ in range(5):
        question = [drawn.randrange(100) for _ in range(40)]
        for _ in range(4):
            choice = [drawn.randrange(100) for _ in range(10)]
            rows.append(Row((*shots, *question, *choice), 240))
    root = check(rows)
    assert root.leaves == []
    (node,) = root.children
    assert node.end == 200
    assert [child.end for child in node.children] == [240] * 5
    assert all(len(child.leaves) == 4 for child in node.children)


def test_short_beginnings_are_not_worth_a_forward() -> None:
    least = OVERHEAD
    short = [Row((*range(least - 1), 100 + i, 7), least) for i in range(50)]
    assert not check(short).children
    long = [Row((*range(least), 100 + i, 7), least + 1) for i in range(50)]
    assert [child.end for child in check(long).children] == [least]
    # Two rows spare one segment, which must be long enough for that.
    assert not check(long[:2]).children
    spared = WORTH * OVERHEAD
    assert check([Row((*range(spared), 100 + i, 7), spared) for i in range(2)]).children


def test_thousands_of_nested_rows_are_no_recursion() -> None:
    tokens = tuple(range(3000))
    rows = [Row((*tokens[:length], 5000), length) for length in range(0, 3000, 2)]
    assert len(check_shallow(rows)) == 1500


def check_shallow(rows: list[Row]) -> list[int]:
    found: list[int] = []
    waiting = [shared_beginnings(rows, OVERHEAD)]
    while waiting:
        node = waiting.pop()
        found += node.leaves
        waiting += node.children
    return sorted(found)
