"""Time from the artefact on disk to a loaded engine, and to its first logits or embedding.

The artefact has just been read, so its files are in the system's page cache: what is measured is
the work of loading, not the disk. A file that is mapped into memory is read when its weights are
first used, which is why the first logits count too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, cast

import torch
from torch import Tensor

from harness.context import Context
from harness.measures.bandwidth import synchronize
from harness.measures.execution import is_simulated
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine
from methods.encoders import EMBED, Encoding


@dataclass(frozen=True)
class Loading:
    """Seconds of loading again, in each way that the method can load its artefact.

    Attributes:
        repeats: how often each way; the median counts, ways take turns.
    """

    repeats: int = 3

    quality: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"memory"})

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"loading's repeats is {self.repeats}; it must be 1 or more")

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return both times of each way; nothing for weights only stored as floats."""
        if is_simulated(engine):
            return []
        loaded: dict[str, list[float]] = {way: [] for way in context.loaders}
        first: dict[str, list[float]] = {way: [] for way in context.loaders}
        token = torch.zeros(1, 1, dtype=torch.int64)
        device = context.hardware.device
        for _ in range(self.repeats):
            for way, load in context.loaders.items():
                start = time.perf_counter()
                other = load()
                synchronize(device)
                loaded[way].append(time.perf_counter() - start)
                _read(other, token)
                synchronize(device)
                first[way].append(time.perf_counter() - start)
                other.close()
        return [
            Value(
                "load",
                metric,
                f"again_{way}" if way else "again",
                median(samples[way]),
                "s",
                False,
                samples=tuple(samples[way]),
            )
            for way in context.loaders
            for metric, samples in (("load_seconds", loaded), (_first_answer(engine), first))
        ]


def _read(engine: Engine, token: Tensor) -> None:
    """Let `engine` answer once, to int64 `token` [1, 1]."""
    if EMBED in engine.capabilities:
        cast(Encoding, engine).embed(token, torch.ones_like(token))
    else:
        engine.prefill(token, last=1)


def _first_answer(engine: Engine) -> str:
    encodes = EMBED in engine.capabilities
    return "first_embedding_seconds" if encodes else "first_logits_seconds"
