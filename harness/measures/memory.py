"""Memory of the keys and values that a context keeps.

Peak memory of the process is taken by the measuring child itself (`harness.measure`), before a
baseline is loaded beside the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

from harness.context import Context
from harness.hardware import Hardware
from harness.measures.execution import is_simulated
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine, SizedCache


@dataclass(frozen=True)
class Memory:
    """Bytes of the cache behind `depth` tokens of one sequence.

    Attributes:
        depth: tokens in the context.
    """

    depth: int = 128

    quality: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"cache"})

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigError(f"memory's depth is {self.depth}; it must be 1 or more")

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return the bytes of the cache's tensors; nothing where the engine hides its cache.

        Raises:
            ConfigError: the model reads fewer tokens than `depth`.
        """
        if is_simulated(engine):
            return []
        if self.depth > engine.context_length:
            raise ConfigError(
                f"memory's depth is {self.depth}, but the model reads at most "
                f"{engine.context_length} tokens"
            )
        generator = torch.Generator().manual_seed(context.seed)
        ids = torch.randint(engine.vocab_size, (1, self.depth), generator=generator)
        _, cache = engine.prefill(ids, last=1)
        held = kept_bytes(cache)
        if held is None:
            return []
        protocol = f"depth{self.depth}_batch1"
        return [Value("memory", "kv_cache_bytes", protocol, float(held), "B", False)]


def kept_bytes(cache: Any) -> int | None:
    """Return the bytes of the keys and values in `cache`; None for one that does not say."""
    if isinstance(cache, SizedCache):
        return cache.nbytes
    if not isinstance(cache, DynamicCache):
        return None
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def free_bytes(hardware: Hardware) -> int:
    """Return the bytes that this process may still take on the device of `hardware`."""
    if hardware.device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = int(psutil.virtual_memory().available)
    if hardware.memory_limit_bytes is None:
        return free
    # Pages shared with the fork server do not count against the limit.
    own = int(psutil.Process().memory_full_info().uss)
    return max(0, min(free, hardware.memory_limit_bytes - own))
