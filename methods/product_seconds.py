"""How long one token's product with a packed matrix takes here: what `mixed` calls decode latency.

Each product is called as the loaded model calls it (Python and all), with activations of one token
in the hardware's type. All are timed in turns, burst by burst, so that what slows the machine down
slows all of them; a product's time is the median of its bursts over their calls. Weights that fit
into a cache stay in it from call to call, which a whole model's may not. Attention, norms and what
lies between the products are not timed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from methods.base import Hardware
from methods.linear import QuantizedModule

ROUNDS = 9
BURST_SECONDS = 0.002
MOST_CALLS = 50

Key = TypeVar("Key", bound=Hashable)


@torch.no_grad()
def product_seconds(
    products: Mapping[Key, tuple[nn.Module, int]], hardware: Hardware
) -> dict[Key, float]:
    """Return key -> median seconds of one call, of key -> (linear map, its inputs).

    Maps are packed (`QuantizedModule`, left as they were: a copy is prepared) or `nn.Linear`.

    Raises:
        ConfigError: a packed kernel refuses a matrix and `hardware` allows no fallback.
    """
    dtype = getattr(torch, hardware.compute_dtype)
    ready = {
        key: (_prepared(module, hardware), inputs) for key, (module, inputs) in products.items()
    }
    drawn = {
        key: torch.randn(1, 1, inputs, generator=torch.Generator().manual_seed(0))
        for key, (_, inputs) in ready.items()
    }
    tokens = {key: x.to(device=hardware.device, dtype=dtype) for key, x in drawn.items()}
    calls = {}
    for key, (module, _) in ready.items():
        _burst(module, tokens[key], 2)
        once = _burst(module, tokens[key], 2)
        calls[key] = max(1, min(MOST_CALLS, round(BURST_SECONDS / max(once, 1e-9))))
    samples: dict[Key, list[float]] = {key: [] for key in ready}
    for _ in range(ROUNDS):
        for key, (module, _) in ready.items():
            samples[key].append(_burst(module, tokens[key], calls[key]))
    return {key: statistics.median(found) for key, found in samples.items()}


def _prepared(module: nn.Module, hardware: Hardware) -> nn.Module:
    """Return a copy of `module` as the engine would run it on `hardware`."""
    own = copy.deepcopy(module).to(hardware.device)
    if isinstance(own, QuantizedModule):
        own.prepare("product", hardware)
        return own
    return own.to(getattr(torch, hardware.compute_dtype))


def _burst(module: nn.Module, x: Tensor, calls: int) -> float:
    """Return the seconds of one of `calls` calls."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        module(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls
