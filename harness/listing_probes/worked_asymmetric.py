"""Chapter 27.2.2: the worked example of 0.5 on the range from -1 to 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Compute what the example prints."""
    scale = 2 / 255
    code = round(0.5 / scale)
    return {"code": code, "restored": f"{code * scale:.5f}", "code_of_one": round(1 / scale)}
