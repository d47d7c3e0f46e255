"""Article 4.1: a benchmark that names methods it does not have, and its evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from harness.listing_probes.restated import raised


class Benchmark:
    """The constructor of the article: the methods it lists are defined nowhere."""

    def __init__(self) -> None:
        self.methods = {"fp32": self.no_quantization}  # type: ignore[attr-defined]


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return what constructing raises, and what evaluation says of a model of tokens and INT8."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50)).eval()
    quantize: Any = torch.ao.quantization.quantize_dynamic
    int8 = quantize(model, {torch.nn.Linear}, torch.qint8)
    batches = [
        {"input": torch.randint(0, 50, (4, 12)), "target": torch.randint(0, 50, (4, 12))}
        for _ in range(5)
    ]
    sizes = [
        sum(parameter.numel() * parameter.element_size() for parameter in one.parameters())
        for one in (model, int8)
    ]
    said = raised(Benchmark)
    return {
        "raised": said,
        "largest_accuracy": _largest_accuracy(batches),
        "counted_float32_bytes": sizes[0],
        "counted_int8_bytes": sizes[1],
        "embedding_bytes": 50 * 16 * 4,
        "as_wanted": said == "nothing",
    }


def _largest_accuracy(batches: list[dict[str, torch.Tensor]]) -> float:
    """Return the article's accuracy where every prediction is right."""
    correct = total = 0
    latency = 0.0
    for batch in batches:
        start = time.time()
        predictions = batch["target"]
        latency += time.time() - start
        correct += int((predictions == batch["target"]).sum().item())
        total += batch["target"].size(0)
    return correct / total
