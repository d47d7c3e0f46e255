"""Article 1.1: linear quantization; codes 0 to 255 of the asymmetric case are put into int8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.listing_probes.restated import dequantize, limits, quantize, relative_error


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the errors of 8 bits on normal weights, symmetric, asymmetric, and stored rightly."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    for name, symmetric in (("symmetric", True), ("asymmetric", False)):
        codes, scale, zero_point = quantize(values, 8, symmetric)
        found[f"{name}_error"] = relative_error(values, dequantize(codes, scale, zero_point))
    # The same codes in a type that holds them.
    low, high = limits(8, symmetric=False)
    wide = torch.clamp(torch.round(values / scale + zero_point), low, high)
    found["uint8_error"] = relative_error(values, dequantize(wide, scale, zero_point))
    found["wrapped_percent"] = 100 * float((codes.int() != wide.int()).float().mean())
    found["smallest_code"] = int(codes.min())
    # All values on one side of zero: the zero point is clamped, and so are the codes.
    codes, scale, zero_point = quantize(torch.linspace(10, 11, 256), 8, False)
    found["distinct_codes_10_to_11"] = len(set(codes.tolist()))
    found["as_wanted"] = found["asymmetric_error"] < 2 * found["uint8_error"]
    return found
