"""How long an encoder takes for a batch of sequences of one length.

The engine and the baseline take turns in the same process, so that a ratio is the median of ratios
of neighbours in time. Sequences are full: no padding, random tokens, on which time does not depend.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from harness.context import Context
from harness.measures.bandwidth import synchronize
from harness.measures.execution import is_simulated
from harness.measures.statistics import relative_spread, stderr_of_median
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine
from methods.encoders import EMBED, Encoding


@dataclass(frozen=True)
class Latency:
    """Seconds from tokens to embeddings at every combination of length and batch size.

    Attributes:
        lengths: tokens of a sequence.
        batches: sequences at once.
        repeats: timed runs of each engine.
        warmup: runs of each engine before the timed ones.
        interleave_baseline: load the baseline too and take turns with it.
    """

    lengths: Sequence[int] = (128,)
    batches: Sequence[int] = (1, 8)
    repeats: int = 9
    warmup: int = 2
    interleave_baseline: bool = True

    quality: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({EMBED})

    def __post_init__(self) -> None:
        for name in ("lengths", "batches"):
            given = getattr(self, name)
            if not given or min(given) < 1:
                raise ConfigError(
                    f"latency's {name} is {list(given)}; it needs numbers of 1 or more"
                )
            object.__setattr__(self, name, tuple(given))
        for name, least in (("repeats", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"latency's {name} is {getattr(self, name)}; it must be {least} or more"
                )

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return times and ratios; nothing for weights only stored as floats.

        Raises:
            ConfigError: the model reads fewer tokens than `lengths` asks for.
        """
        if is_simulated(engine):
            return []
        if max(self.lengths) > engine.context_length:
            raise ConfigError(
                f"latency's lengths has {max(self.lengths)}, but the model reads at most "
                f"{engine.context_length} tokens"
            )
        with ExitStack() as stack:
            engines = [engine]
            if self.interleave_baseline and context.baseline is not None:
                engines.append(context.baseline())
                stack.callback(engines[1].close)
            points: list[dict[str, Any]] = []
            context.details["latency"] = {
                "interleaved_with_baseline": len(engines) > 1,
                "warmup_runs": self.warmup,
                "runs": self.repeats,
                "points": points,
            }
            values: list[Value] = []
            for length, batch in product(self.lengths, self.batches):
                values += self._measure(engines, length, batch, context, points)
            return values

    def _measure(
        self,
        engines: Sequence[Engine],
        length: int,
        batch: int,
        context: Context,
        points: list[dict[str, Any]],
    ) -> list[Value]:
        generator = torch.Generator().manual_seed(context.seed)
        ids = torch.randint(engines[0].vocab_size, (batch, length), generator=generator)
        load_before = os.getloadavg()[0]
        seconds: list[list[float]] = [[] for _ in engines]
        for turn in range(self.warmup + self.repeats):
            for one, found in zip(engines, seconds, strict=True):
                taken = _seconds(cast(Encoding, one), ids, context.hardware.device)
                if turn >= self.warmup:
                    found.append(taken)
        protocol = f"length{length}_batch{batch}"
        load = [load_before, os.getloadavg()[0]]
        points.append({"protocol": protocol, "load_average": load})
        return _values(protocol, batch, seconds, context.seed)


def _seconds(engine: Encoding, ids: Tensor, device: str) -> float:
    """Return the seconds from int64 `ids` [B, T] to their embeddings."""
    mask = torch.ones_like(ids)
    synchronize(device)
    start = time.perf_counter()
    engine.embed(ids, mask)
    synchronize(device)
    return time.perf_counter() - start


def _values(protocol: str, batch: int, seconds: list[list[float]], seed: int) -> list[Value]:
    own = seconds[0]
    rate = batch / median(own)
    values = [
        Value("latency", "latency_seconds", protocol, median(own), "s", False, None, tuple(own)),
        Value("latency", "sequences_per_second", protocol, rate, "sequences/s", True),
        Value("latency", "timing_spread", protocol, relative_spread(own), "ratio", None),
    ]
    if len(seconds) > 1:
        ratios = [theirs / ours for ours, theirs in zip(own, seconds[1], strict=True)]
        error = stderr_of_median(ratios, seed)
        speedup = median(ratios)
        found = Value("latency", "latency_speedup", protocol, speedup, "ratio", True, error)
        values.append(replace(found, samples=tuple(ratios)))
    return values
