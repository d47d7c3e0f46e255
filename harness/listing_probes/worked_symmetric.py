"""Guide, part 1: the worked example of five weights, symmetric in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Compute what the example prints."""
    weights = [-2.5, -1.0, 0.0, 1.2, 3.8]
    scale = max(abs(weight) for weight in weights) / 127
    codes = [round(weight / scale) for weight in weights]
    return {
        "scale": round(scale, 4),
        "codes": str(codes),
        "restored": str([round(code * scale, 2) for code in codes]),
        "errors": str(
            [
                round(code * scale - weight, 2) + 0.0
                for code, weight in zip(codes, weights, strict=True)
            ]
        ),
    }
