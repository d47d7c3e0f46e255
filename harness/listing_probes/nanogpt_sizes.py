"""Guide, part 3 and 5: what quantize_dynamic left on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAIRS = (("model.pt", "model_quantized.pt"), ("out/ckpt.pt", "out/ckpt_quantized.pt"))


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of the files before and after, and their ratio."""
    before, after = next(pair for pair in PAIRS if Path(pair[1]).exists())
    sizes = [Path(name).stat().st_size / 1e6 for name in (before, after)]
    return {"before_mb": sizes[0], "after_mb": sizes[1], "ratio": sizes[0] / sizes[1]}
