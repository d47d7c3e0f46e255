"""Guide, part 3: the difference of the outputs that the timing listing prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean difference beside the mean size of a logit; times are not kept."""
    return {
        "difference": float(names["diff"]),
        "mean_logit": float(names["output_fp32"].abs().mean()),
    }
