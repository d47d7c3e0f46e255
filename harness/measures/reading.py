"""Rows of tokens read by an engine in few forwards: alike beginnings once, the rest in batches.

A batch holds rows of nearly equal length, padded on the right, which no earlier token of a causal
model sees. Where the engine can fork its cache, rows that begin alike go on from one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.measures.shared_prefix import LEAST_SEGMENT, Node, Row, shared_beginnings
from harness.measures.windows import FLOAT_BYTES, LOGITS_BYTES
from methods.base import Cache, Engine, Forking

SLACK = 4
"""Beginnings read together differ by at most so many tokens, which are read again for each row."""

MOST_PADDED = 1.25
"""Tokens of a batch over those of its rows: beyond it a smaller batch is faster."""


class RowReader:
    """Reads rows through `engine`, at most `batch_size` at once."""

    def __init__(self, engine: Engine, batch_size: int) -> None:
        self.engine = engine
        self.batch_size = batch_size
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
        root = shared_beginnings(rows)
        yield from self._leaves(rows, [(index, 0) for index in root.leaves], None, 0)
        yield from self._children(rows, [(child, 0) for child in root.children], None, 0)

    def _children(
        self, rows: Sequence[Row], nodes: list[tuple[Node, int]], cache: Cache | None, start: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Read on from `cache`, which holds `start` tokens, into `nodes`; each names its sequence.

        Beginnings of nearly equal length are read together, up to the shortest's end; the few
        tokens that the others are longer by are read with their rows.
        """
        nodes = sorted(nodes, key=lambda entry: (-entry[0].end, entry[0].row))
        while nodes:
            near = nodes[0][0].end - SLACK
            size = next((i for i, (node, _) in enumerate(nodes) if node.end < near), len(nodes))
            size = min(size, self.forked)
            batch, nodes = nodes[:size], nodes[size:]
            end = batch[-1][0].end
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
        leaves = sorted(leaves, key=lambda leaf: (-len(rows[leaf[0]].tokens), rows[leaf[0]].tokens))
        while leaves:
            most = self.batch_size if cache is None else self.forked
            size = self._size([rows[index] for index, _ in leaves[:most]], start)
            batch, leaves = leaves[:size], leaves[size:]
            members = [rows[index] for index, _ in batch]
            length = len(members[0].tokens)
            first = min(row.shareable for row in members)
            padded = [[*row.tokens[start:], *[0] * (length - len(row.tokens))] for row in members]
            fork = self._fork(cache, [sequence for _, sequence in batch])
            logits, _ = self.engine.prefill(torch.tensor(padded), fork, last=length - first)
            for (index, _), row, found in zip(batch, members, logits, strict=True):
                yield index, found[row.shareable - first : len(row.tokens) - first]

    def _size(self, rows: Sequence[Row], start: int) -> int:
        """Return how many of `rows`, the longest first, are read at once.

        Padding is computed as any token is, and the logits of the batch must fit.
        """
        longest = len(rows[0].tokens) - start
        scored = max(len(row.tokens) - row.shareable for row in rows)
        most = max(1, LOGITS_BYTES // (scored * self.engine.vocab_size * FLOAT_BYTES))
        total = 0
        for count, row in enumerate(rows[:most], start=1):
            total += len(row.tokens) - start
            if count * longest > MOST_PADDED * total:
                return count - 1
        return min(most, len(rows))

    def _fork(self, cache: Cache | None, sequences: Sequence[int]) -> Cache | None:
        if cache is None:
            return None
        assert self.forking is not None
        return self.forking.fork(cache, sequences)


def _forking(engine: Engine) -> Forking | None:
    able = "fork" in engine.capabilities and not couples_rows(engine)
    return engine if isinstance(engine, Forking) and able else None


def couples_rows(engine: Engine) -> bool:
    """Return whether what the engine says of a row depends on what is read beside it."""
    return bool(getattr(engine, "couples_rows", False))


Ends = Callable[[list[int]], bool]
"""Whether a text ends with its last token."""


def write_greedily(
    engine: Engine, prompts: Sequence[Sequence[int]], most: int, ends: Ends
) -> list[list[int]]:
    """Return the tokens that greedy decoding writes behind each of `prompts`, at most `most`.

    All rows advance together: a prompt longer than the shortest is fed token by token while the
    shorter ones already write, so a batch needs no padding. Where the engine can fork, a common
    beginning is read once, and rows whose texts have ended are dropped; not where it forks one
    sequence only.
    """
    forking = _forking(engine)
    if forking is not None and forking.most_forked is not None:
        forking = None
    shortest = min(map(len, prompts))
    cache: Any = None
    start = 0
    if forking is not None and len(prompts) > 1:
        start = _common(prompts, shortest - 1)
        start = start if start >= LEAST_SEGMENT else 0
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
