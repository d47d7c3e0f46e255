"""Rows of tokens read by an engine in few forwards: alike beginnings once, the rest in batches.

A batch holds rows of nearly equal length, padded on the right, which no earlier token of a causal
model sees. Where the engine can fork its cache, rows that begin alike go on from one cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from harness.measures.shared_prefix import Node, Row, shared_beginnings
from harness.measures.windows import FLOAT_BYTES, LOGITS_BYTES
from methods.base import Cache, Engine, Forking


class RowReader:
    """Reads rows through `engine`, at most `batch_size` at once.

    `overhead` is how many tokens cost as much as a forward does by itself: what is padded or read
    twice is weighed against it, and a beginning shorter than that is not shared.
    """

    def __init__(self, engine: Engine, batch_size: int, overhead: int) -> None:
        self.engine = engine
        self.batch_size = batch_size
        self.overhead = overhead
        self.forking = _forking(engine)
        # As many sequences as the engine forks where one cache is read on.
        self.forked = batch_size
        if self.forking is not None and self.forking.most_forked is not None:
            self.forked = min(batch_size, self.forking.most_forked)

    def logits(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tensor]]:
        """Yield (index, float32 logits [n, V]) of each row: of its n tokens that are not shareable.

        The order is the reader's own. The logits are good until the next row is asked for.
        """
        if self.forking is None:
            yield from self._leaves(rows, [(index, 0) for index in range(len(rows))], None, 0)
            return
        root = shared_beginnings(rows, self.overhead)
        yield from self._leaves(rows, [(index, 0) for index in root.leaves], None, 0)
        yield from self._children(rows, [(child, 0) for child in root.children], None, 0)

    def _children(
        self, rows: Sequence[Row], nodes: list[tuple[Node, int]], cache: Cache | None, start: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Read on from `cache`, which holds `start` tokens, into `nodes`; each names its sequence.

        Beginnings of nearly equal length are read together, up to the shortest's end; the few
        tokens that the others are longer by are read again with each row.
        """
        nodes = sorted(nodes, key=lambda entry: (-entry[0].end, entry[0].row))
        ends = [node.end for node, _ in nodes]
        following = [len(node.leaves) + len(node.children) for node, _ in nodes]
        after = [0, *accumulate(following)]
        weighted = [0, *accumulate(end * n for end, n in zip(ends, following, strict=True))]

        def cost(i: int, j: int) -> int:
            end = ends[j - 1]
            again = weighted[j] - weighted[i] - end * (after[j] - after[i])
            return (j - i) * (end - start) + again + self.overhead

        for i, j in batches(len(nodes), self.forked, cost):
            batch, end = nodes[i:j], ends[j - 1]
            ids = torch.tensor([rows[node.row].tokens[start:end] for node, _ in batch])
            fork = self._fork(cache, [sequence for _, sequence in batch])
            _, read = self.engine.prefill(ids, fork, last=1)
            inside = [node for node, _ in batch]
            leaves = [(leaf, place) for place, node in enumerate(inside) for leaf in node.leaves]
            yield from self._leaves(rows, leaves, read, end)
            below = [(child, place) for place, node in enumerate(inside) for child in node.children]
            yield from self._children(rows, below, read, end)

    def _leaves(
        self, rows: Sequence[Row], leaves: list[tuple[int, int]], cache: Cache | None, start: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Read the rest of the rows `leaves` behind their sequence of `cache`."""
        if not leaves:
            return
        leaves = sorted(leaves, key=lambda leaf: (-len(rows[leaf[0]].tokens), rows[leaf[0]].tokens))
        lengths = [len(rows[index].tokens) - start for index, _ in leaves]
        scored = max(len(rows[index].tokens) - rows[index].shareable for index, _ in leaves)
        fitting = LOGITS_BYTES // (self.engine.vocab_size * FLOAT_BYTES)

        def cost(i: int, j: int) -> float:
            # The logits begin where the shortest row's are asked for, or before.
            logits = (j - i) * (lengths[i] - lengths[j - 1] + scored)
            if j - i > 1 and logits > fitting:
                return math.inf
            return (j - i) * lengths[i] + self.overhead

        most = self.batch_size if cache is None else self.forked
        for i, j in batches(len(leaves), most, cost):
            batch = leaves[i:j]
            members = [rows[index] for index, _ in batch]
            length = len(members[0].tokens)
            first = min(row.shareable for row in members)
            padded = [[*row.tokens[start:], *[0] * (length - len(row.tokens))] for row in members]
            fork = self._fork(cache, [sequence for _, sequence in batch])
            logits, _ = self.engine.prefill(torch.tensor(padded), fork, last=length - first)
            for (index, _), row, found in zip(batch, members, logits, strict=True):
                yield index, found[row.shareable - first : len(row.tokens) - first]

    def _fork(self, cache: Cache | None, sequences: Sequence[int]) -> Cache | None:
        if cache is None:
            return None
        assert self.forking is not None
        return self.forking.fork(cache, sequences)


def batches(count: int, most: int, cost: Callable[[int, int], float]) -> Iterator[tuple[int, int]]:
    """Yield the cheapest cut of `count` things in order into runs [i, j) of at most `most`.

    `cost(i, j)` is that of one run; the sum over all is least (dynamic programming).
    """
    least, start = [0.0], [0]
    for j in range(1, count + 1):
        found = min((least[i] + cost(i, j), i) for i in range(max(0, j - most), j))
        least.append(found[0])
        start.append(found[1])
    cuts = [count]
    while cuts[-1] > 0:
        cuts.append(start[cuts[-1]])
    yield from pairwise(reversed(cuts))


def _forking(engine: Engine) -> Forking | None:
    able = "fork" in engine.capabilities and not couples_rows(engine)
    return engine if isinstance(engine, Forking) and able else None


def couples_rows(engine: Engine) -> bool:
    """Return whether what the engine says of a row depends on what is read beside it."""
    return bool(getattr(engine, "couples_rows", False))


Ends = Callable[[list[int]], bool]
"""Whether a text ends with its last token."""


def write_greedily(
    engine: Engine, prompts: Sequence[Sequence[int]], most: int, ends: Ends, overhead: int
) -> list[list[int]]:
    """Return the tokens that greedy decoding writes behind each of `prompts`, at most `most`.

    All rows advance together: a prompt longer than the shortest is fed token by token while the
    shorter ones already write, so a batch needs no padding. Where the engine forks any number of
    sequences, a common beginning of `overhead` tokens is read once, and rows whose texts have ended
    are dropped.
    """
    forking = _forking(engine)
    if forking is not None and forking.most_forked is not None:
        forking = None
    shortest = min(map(len, prompts))
    cache: Any = None
    start = 0
    if forking is not None and len(prompts) > 1:
        start = _common(prompts, shortest - 1)
        start = start if start >= overhead else 0
        if start:
            _, cache = engine.prefill(torch.tensor([prompts[0][:start]]), last=1)
            cache = forking.fork(cache, [0] * len(prompts))
    ids = torch.tensor([prompt[start:shortest] for prompt in prompts])
    logits, cache = engine.prefill(ids, cache, last=1)
    written: list[list[int]] = [[] for _ in prompts]
    rows, writing = list(range(len(prompts))), [True] * len(prompts)
    for position in range(shortest, max(map(len, prompts)) + most):
        tokens = logits[:, -1].argmax(-1).tolist()
        for place, row in enumerate(rows):
            if position < len(prompts[row]):
                tokens[place] = prompts[row][position]
            elif writing[row]:
                written[row].append(tokens[place])
                writing[row] = len(written[row]) < most and not ends(written[row])
        left = [place for place, row in enumerate(rows) if writing[row]]
        if not left:
            break
        # A copy of the cache costs about as much as reading it in a few steps.
        if forking is not None and 2 * len(left) <= len(rows):
            cache = forking.fork(cache, left)
            rows, tokens = [rows[place] for place in left], [tokens[place] for place in left]
        logits, cache = engine.decode(torch.tensor(tokens)[:, None], cache)
    return written


def _common(prompts: Sequence[Sequence[int]], most: int) -> int:
    """Return how many tokens, at most `most`, all `prompts` begin with."""
    ordered = sorted(map(list, prompts))
    first, last = ordered[0], ordered[-1]
    return next((i for i in range(most) if first[i] != last[i]), max(0, most))
