"""Article 6.1: learned step sizes and a choice by hardware."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.listing_probes.restated import raised

KEY = "tensor_core_support"
HARDWARE: dict[str, dict[str, bool]] = {
    "nvidia_a100": {KEY: True},
    "intel_cpu": {"avx512_support": True},
    "arm_mobile": {"neon_support": True},
}


class Quantizer(nn.Module):
    """The article's learned quantizer: round((x - beta) / scale) · scale + beta."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = (nn.Parameter(torch.tensor(start)) for start in (1.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded `x`; nothing is clipped."""
        scale = self.alpha / 127
        return torch.round((x - self.beta) / scale) * scale + self.beta


class Techniques:
    """The constructor of the article names a method that is defined nowhere."""

    def __init__(self) -> None:
        self.techniques = {"distillation": self._kd_quantization}  # type: ignore[attr-defined]


def probe(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return what constructing raises, gradients, whether it is ever called, and KeyErrors."""
    torch.manual_seed(0)
    weight = torch.randn(256, requires_grad=True)
    quantizer = Quantizer()
    rounded = quantizer(100 * weight)
    rounded.sum().backward()
    assert weight.grad is not None
    assert quantizer.beta.grad is not None
    layer, batch = nn.Linear(8, 8), torch.randn(2, 8)
    before = layer(batch)
    layer.weight_quantizer = Quantizer()
    chosen = {name: raised(partial(about.__getitem__, KEY)) for name, about in HARDWARE.items()}
    said = raised(Techniques)
    return {
        "raised": said,
        "weights_gradient": float(weight.grad.abs().max()),
        "betas_gradient": float(quantizer.beta.grad.abs()),
        "distinct_codes": len((rounded * 127).round().unique()),
        "output_unchanged": bool(torch.equal(before, layer(batch))),
        **{f"{name}_raised": said for name, said in chosen.items()},
        "as_wanted": said == "nothing" and float(weight.grad.abs().max()) > 0,
    }
