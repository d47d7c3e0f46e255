"""What every engine that forks its cache must keep to."""

from __future__ import annotations

from typing import Any

import torch


def check_fork(engine: Any, ids: torch.Tensor) -> None:
    """What goes on from a fork is what goes on from the whole text; the cache itself stays."""
    several = engine.most_forked is None
    beginning, rest = ids[: 2 if several else 1, :8], ids[:, 8:12]
    _, cache = engine.prefill(beginning, last=1)
    for rows in ([0, 1, 1, 0], [1, 1, 1], [0]) if several else ([0], [0]):
        fork = engine.fork(cache, rows)
        continued = rest[: len(rows)]
        found, fork = engine.prefill(continued, fork)
        whole = torch.cat([beginning[rows], continued], 1)
        expected, _ = engine.prefill(whole, last=4)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        token = found[:, -1:].argmax(-1)
        found, _ = engine.decode(token, fork)
        expected, _ = engine.prefill(torch.cat([whole, token], 1), last=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found, _ = engine.prefill(rest[: len(beginning)], cache)
    expected, _ = engine.prefill(torch.cat([beginning, rest[: len(beginning)]], 1), last=4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def drawn(rows: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, 12), generator=torch.Generator().manual_seed(3))
