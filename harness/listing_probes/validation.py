"""Chapter 27.8.2: outputs of two models compared with ==, for prompts that are text and ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.listing_probes.restated import raised


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Call the listing's function with text and with ids, the model against itself."""
    folder = "meta-llama/Llama-2-7b-hf"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)("Hello", return_tensors="pt").input_ids
    evaluate = names["evaluate_quantized_model"]
    result = evaluate(model, model, [ids])[0]["match"]
    text = raised(lambda: evaluate(model, model, ["Hello"]))
    return {
        "text_raised": text,
        "match_of_ids": type(result).__name__,
        "match_elements": int(result.numel()),
        "if_raised": raised(lambda: bool(result)),
        "as_wanted": text == "nothing" and isinstance(result, bool),
    }
