"""Chapter 27.6: modules of the model that a quantization_config made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Count the linear modules by class."""
    kinds = Counter(type(module).__name__ for module in names["model"].modules())
    found = {kind: count for kind, count in sorted(kinds.items()) if "Linear" in kind}
    return {"modules": ", ".join(f"{count} {kind}" for kind, count in found.items())}
