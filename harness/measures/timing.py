"""One burst of timed work: a prompt read, then tokens decoded one by one, each on its own clock.

Times are wall-clock seconds (`time.perf_counter`). On CUDA the device is waited for before every
reading of the clock, so a token's time is what a user who looks at each token waits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.measures.bandwidth import synchronize
from methods.base import Engine


@dataclass(frozen=True)
class Point:
    """Where speed is measured.

    Attributes:
        prompt: tokens of the prompt whose reading is timed.
        depth: tokens in the context when the first timed token is decoded.
        batch: sequences at once.
    """

    prompt: int
    depth: int
    batch: int

    @property
    def protocol(self) -> str:
        """Name of the point in a value's protocol."""
        return f"prompt{self.prompt}_depth{self.depth}_batch{self.batch}"

    def ids(self, vocab_size: int, seed: int) -> Tensor:
        """Return drawn tokens, int64 [batch, max(prompt, depth)]: speed does not depend on them."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, max(self.prompt, self.depth))
        return torch.randint(vocab_size, shape, generator=generator)


@dataclass(frozen=True)
class Burst:
    """Seconds to the first token, and seconds of each token after it (one sequence or a batch)."""

    first: float
    tokens: tuple[float, ...]


def run_burst(engine: Engine, point: Point, ids: Tensor, tokens: int, device: str) -> Burst:
    """Time the prompt of `point` and then `tokens` greedy decoding steps at its depth.

    Choosing the token is part of the time: without it there is nothing to read on with.
    """
    synchronize(device)
    start = time.perf_counter()
    logits, cache = engine.prefill(ids[:, : point.prompt], last=1)
    token = logits[:, -1:].argmax(-1)
    synchronize(device)
    first = time.perf_counter() - start
    if point.depth != point.prompt:
        logits, cache = engine.prefill(ids[:, : point.depth], last=1)
        token = logits[:, -1:].argmax(-1)
        synchronize(device)
    seconds = []
    for _ in range(tokens):
        start = time.perf_counter()
        logits, cache = engine.decode(token, cache)
        token = logits[:, -1:].argmax(-1)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Burst(first, tuple(seconds))
