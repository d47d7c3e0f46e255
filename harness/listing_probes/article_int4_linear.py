"""Article 3.2: a linear layer that unpacks and dequantizes its whole weight at every call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from harness.listing_probes.restated import dequantize, pack, quantize, relative_error, unpack

GROUP = 128


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the output's error, and the floats that one call makes beside the packed weight."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(shape, generator=generator) for shape in ((256, 256), (1, 256)))
    groups = [quantize(group, 4, True) for group in weight.view(-1, GROUP)]
    packed = pack(torch.cat([codes for codes, _, _ in groups]))

    def forward(given: torch.Tensor) -> tuple[torch.Tensor, int]:
        codes = torch.split(unpack(packed), GROUP)
        parts = zip(codes, groups, strict=True)
        whole = torch.cat([dequantize(part, scale, zero) for part, (_, scale, zero) in parts])
        return functional.linear(given, whole.view_as(weight)), 4 * whole.numel()

    output, made = forward(inputs)
    error = relative_error(functional.linear(inputs, weight), output)
    # Registered as empty buffers, the saved tensors do not fit when a saved model is loaded.
    layer = torch.nn.Module()
    layer.register_buffer("packed_weight", torch.empty(0, dtype=torch.uint8))
    return {
        "error": error,
        "packed_bytes": packed.numel(),
        "bytes_made_a_call": made,
        "load_state_dict": _loading(layer, packed),
        "as_wanted": error < 0.2,
    }


def _loading(layer: torch.nn.Module, packed: torch.Tensor) -> str:
    try:
        layer.load_state_dict({"packed_weight": packed})
    except RuntimeError as error:
        return "raises: size mismatch" if "size mismatch" in str(error) else "raises"
    return "works"
