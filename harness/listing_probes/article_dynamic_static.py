"""Article 1.2: dynamic quantization by torch.ops.quantized.linear, and calibrated ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.listing_probes.restated import quantize, raised


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the product of int8 tensors raises, and what is kept to calibrate a linear."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(shape, generator=generator) for shape in ((64, 32), (4, 32)))
    weights, weight_scale, _ = quantize(weight, 8, True)
    rounded, input_scale, _ = quantize(inputs, 8, True)

    def product() -> object:
        return torch.ops.quantized.linear(rounded, weights, None, weight_scale * input_scale, 0)

    # The static half keeps every output of every linear until the end.
    layer, kept = torch.nn.Linear(32, 64), []
    layer.register_forward_hook(lambda module, given, output: kept.append(output.detach().clone()))
    batches = 50
    for _ in range(batches):
        layer(inputs)
    _, scale, zero_point = quantize(torch.cat(kept), 8, True)
    said = raised(product)
    return {
        "raised": said,
        "batches": batches,
        "kept_numbers": sum(output.numel() for output in kept),
        "static_scale_above_zero": scale > 0,
        "static_zero_point": zero_point,
        "as_wanted": said == "nothing",
    }
