"""Which rows of tokens begin alike, so that a beginning is read once for all of them.

The rows are sorted, and the longest common prefixes of neighbours make a tree of intervals (the
lcp-interval tree of Abouelhoda, Kurtz and Ohlebusch, "Replacing suffix trees with enhanced suffix
arrays", 2004), of which only the branches that save enough are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

WORTH = 2
"""Times the overhead that a forward of its own must spare: it also costs a copy of its cache."""


@dataclass(frozen=True)
class Row:
    """Tokens to read; only the first `shareable` of them may be read in another row's name."""

    tokens: tuple[int, ...]
    shareable: int


@dataclass
class Node:
    """A beginning that several rows share.

    Attributes:
        row: the index of one of them.
        end: tokens of the beginning.
        leaves: indices of the rows that go on from here alone.
        children: longer beginnings.
    """

    row: int
    end: int
    leaves: list[int] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)


@dataclass
class _Interval:
    """Neighbouring sorted rows [low, high) that share `length` tokens."""

    length: int
    low: int
    high: int = 0
    inside: list[_Interval] = field(default_factory=list)


def shared_beginnings(rows: Sequence[Row], overhead: int) -> Node:
    """Return the tree whose root is the empty beginning; each row is a leaf of exactly one node.

    `overhead` is how many tokens cost as much as a forward does by itself: a beginning is at least
    so long, and spares WORTH times as much. Leaves and children stand in the order of the sorted
    rows.
    """
    order = sorted(range(len(rows)), key=lambda index: rows[index].tokens)
    root = Node(order[0] if order else 0, 0)
    if not order:
        return root
    waiting = [(root, _intervals([rows[index] for index in order]))]
    while waiting:
        above, interval = waiting.pop()
        segment = interval.length - above.end
        spared = (interval.high - interval.low - 1) * segment
        node = above
        if segment >= overhead and spared >= WORTH * overhead:
            node = Node(order[interval.low], interval.length)
            above.children.append(node)
        covered = [place for one in interval.inside for place in range(one.low, one.high)]
        alone = sorted({*range(interval.low, interval.high)} - {*covered})
        node.leaves += [order[place] for place in alone]
        waiting += [(node, one) for one in interval.inside]
    return root


def _intervals(rows: Sequence[Row]) -> _Interval:
    """Return the tree of intervals of sorted `rows`; the root holds all of them."""
    stack = [_Interval(0, 0)]
    closed: _Interval | None = None
    for place in range(1, len(rows) + 1):
        length = -1 if place == len(rows) else _shared(rows[place - 1], rows[place])
        low = place - 1
        while stack and length < stack[-1].length:
            closed = stack.pop()
            closed.high, low = place, closed.low
            if stack and length <= stack[-1].length:
                stack[-1].inside.append(closed)
                closed = None
        if stack and length > stack[-1].length:
            stack.append(_Interval(length, low, inside=[closed] if closed else []))
            closed = None
    assert closed is not None  # the length of -1 at the end closes the root last
    return closed


def _shared(first: Row, second: Row) -> int:
    """Return how many tokens both rows begin with and may share."""
    most = min(first.shareable, second.shareable)
    if first.tokens[:most] == second.tokens[:most]:
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if first.tokens[:middle] == second.tokens[:middle]:
            low = middle
        else:
            high = middle
    return low
