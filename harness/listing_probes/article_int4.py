"""Article 3.1: 4-bit codes packed by shifts, in groups of 128 along the flattened matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.listing_probes.restated import dequantize, pack, quantize, relative_error, unpack

GROUP = 128


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether all pairs of codes survive packing, and bits a weight with scales counted."""
    every = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(every, every).flatten()
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    groups = [quantize(group, 4, True) for group in weight.view(-1, GROUP)]
    codes = torch.cat([codes for codes, _, _ in groups])
    restored = torch.cat([dequantize(*group) for group in groups]).view_as(weight)
    stored = [
        pack(codes),
        torch.tensor([g[1] for g in groups]),
        torch.tensor([g[2] for g in groups]),
    ]
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in stored) / weight.numel()
    # Groups of the flattened matrix end in the middle of a row where 128 does not divide it.
    return {
        "pairs": len(pairs) // 2,
        "pairs_survive": bool(torch.equal(unpack(pack(pairs)), pairs)),
        "weight_survives": bool(torch.equal(unpack(stored[0]), codes)),
        "error": relative_error(weight, restored),
        "bits_a_weight": bits,
        "compression_of_float32": 32 / bits,
        "as_wanted": bool(torch.equal(unpack(stored[0]), codes)),
    }
