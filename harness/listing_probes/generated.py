"""Listings that generate: that text came out, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens that the listing's `output` or `outputs` holds."""
    if "output" in names:
        return {"new_tokens": int(names["output"]["usage"]["completion_tokens"])}
    return {"tokens": int(names["outputs"][0].numel())}
