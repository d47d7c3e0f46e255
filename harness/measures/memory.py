"""Memory that running the artefact takes: the process's peak, and the keys and values kept.

Runs before every other measure, in a process that has done nothing but load the artefact: what
measures need for themselves (logits of whole windows, a baseline) is not the model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

from harness.context import Context
from harness.hardware import Hardware
from harness.measures.execution import is_simulated
from harness.memory import peak_bytes
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine, SizedCache
from methods.encoders import EMBED, Encoding


@dataclass(frozen=True)
class Memory:
    """Peak memory of loading, reading `depth` tokens and writing one; bytes of the cache then.

    An encoder writes nothing and keeps nothing: its peak is that of reading them.

    Attributes:
        depth: tokens in the context.
    """

    depth: int = 128

    quality: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"memory"})
    goes_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigError(f"memory's depth is {self.depth}; it must be 1 or more")

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return both; no bytes of a cache where the engine hides it.

        Raises:
            ConfigError: the model reads fewer tokens than `depth` and one.
        """
        if is_simulated(engine):
            return []
        encodes = EMBED in engine.capabilities
        if self.depth + (not encodes) > engine.context_length:
            written = "" if encodes else ", the written one included"
            raise ConfigError(
                f"memory's depth is {self.depth}, but the model reads at most "
                f"{engine.context_length} tokens{written}"
            )
        generator = torch.Generator().manual_seed(context.seed)
        ids = torch.randint(engine.vocab_size, (1, self.depth), generator=generator)
        held = None
        if encodes:
            cast(Encoding, engine).embed(ids, torch.ones_like(ids))
        else:
            _, cache = engine.prefill(ids, last=1)
            held = kept_bytes(cache)
            engine.decode(ids[:, :1], cache)
        values = [
            Value("memory", "peak_memory_bytes", f"{where}_depth{self.depth}", float(n), "B", False)
            for where, n in _peaks(context).items()
        ]
        if held is not None:
            protocol = f"depth{self.depth}_batch1"
            values.append(Value("memory", "kv_cache_bytes", protocol, float(held), "B", False))
        return values


def _peaks(context: Context) -> dict[str, int]:
    if context.hardware.device == "cuda":
        return {
            "cuda_allocated_peak": torch.cuda.max_memory_allocated(),
            "cuda_reserved_peak": torch.cuda.max_memory_reserved(),
        }
    return {"process_peak": peak_bytes() - context.resident_at_start}


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
