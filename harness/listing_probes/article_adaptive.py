"""Article 2.2: bits by sensitivity until a running product of ratios reaches 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from harness.listing_probes.restated import dequantize, quantize

TARGET, SENSITIVE = 4.0, 0.01


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the article's loop gives eight equal linears, and the ratio the model has."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8)))
    batch = torch.randn(16, 64)
    with torch.no_grad():
        before = layers(batch)
        scores = {}
        for name, layer in layers.named_children():
            weight = layer.get_parameter("weight")
            kept = weight.data.clone()
            weight.data = dequantize(*quantize(weight.data, 8, True))
            scores[name] = functional.mse_loss(before, layers(batch)).item()
            weight.data = kept
    bits, product = {}, 1.0
    for name, score in sorted(scores.items(), key=lambda entry: entry[1], reverse=True):
        bits[name] = 32 if product >= TARGET else 8 if score > SENSITIVE else 4
        product *= 32 / bits[name]
    true = 32 * len(bits) / sum(bits.values())
    first = max(scores, key=lambda name: scores[name])
    return {
        "layers": len(bits),
        "quantized_layers": sum(width < 32 for width in bits.values()),
        "bits_of_most_sensitive": bits[first],
        "claimed_ratio": product,
        "true_ratio": true,
        "as_wanted": true >= TARGET,
    }
