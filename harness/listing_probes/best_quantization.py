"""Guide, part 9: the search over configurations is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Call the search on a small model."""
    names["find_best_quantization"](torch.nn.Linear(4, 4), [torch.zeros(1, 4)])
    return {}
