"""Guide, part 9: mixed precision on a GPT-2 of twelve blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from harness.listing_probes.restated import raised


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Apply the listing's function; count what it changed, and run the model."""
    model = AutoModelForCausalLM.from_pretrained("gpt2", dtype=torch.float32)
    changed = names["apply_mixed_precision"](model, names["MixedPrecisionConfig"]())
    kinds = [type(module).__module__ for module in changed.modules()]
    dtypes = [parameter.dtype for parameter in changed.parameters()]
    said = raised(lambda: changed(torch.arange(8)[None]))
    int8 = sum("quantized" in kind for kind in kinds)
    return {
        "int8_modules": int8,
        "half_tensors": sum(dtype == torch.float16 for dtype in dtypes),
        "float32_tensors": sum(dtype == torch.float32 for dtype in dtypes),
        "raised": said,
        "as_wanted": int8 > 0 and said == "nothing",
    }
