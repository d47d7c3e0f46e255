"""Bitsandbytes listings: which modules the loaded model has, and its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Count the modules of bitsandbytes in the models that the listing left."""
    found: dict[str, Any] = {}
    for name in ("model_int8", "model_int4", "model"):
        if name in names:
            kinds = Counter(type(module).__name__ for module in names[name].modules())
            kept = {k: n for k, n in sorted(kinds.items()) if "Linear" in k or k == "Conv1D"}
            found[name] = ", ".join(f"{count} {kind}" for kind, count in kept.items())
            found[f"{name}_bytes"] = int(names[name].get_memory_footprint())
    return found
