"""torchao's fake quantization of weights, trained here and stored in this project's format.

`torchao.quantization.quantize_` with `QATConfig(step="prepare")` puts a `FakeQuantizedLinear`
around the very parameters that are trained. Its symmetric levels are scale = max|w| * 2 /
(2**bits - 1), q = clamp(round(w / scale), -2**(bits - 1), 2**(bits - 1) - 1): the grid of
`methods.affine` with another scale, so codes and scales are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from methods.affine import PER_CHANNEL, SCALE_DTYPES, Affine, Quantized
from methods.base import Matrix
from methods.library import check_covered, linears_only

DTYPES = {8: "int8", 4: "int4", 3: "int3", 2: "int2"}


class TorchaoLevels:
    """Weights rounded by torchao's modules; `model` gets these in place of its linear maps."""

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix], affine: Affine) -> None:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import (
            FakeQuantizedLinear,
            IntxFakeQuantizeConfig,
            QATConfig,
        )

        whole = affine.group_size == PER_CHANNEL
        weights = IntxFakeQuantizeConfig(
            getattr(torch, DTYPES[affine.bits]),
            "per_channel" if whole else "per_group",
            group_size=None if whole else affine.group_size,
            is_symmetric=True,
            scale_precision=SCALE_DTYPES[affine.scale_dtype],
        )
        linears_only(model, matrices)
        wanted = {matrix.name for matrix in matrices}
        quantize_(
            model,
            QATConfig(weight_config=weights, step="prepare"),
            filter_fn=lambda module, name: name in wanted and isinstance(module, nn.Linear),
        )
        model.requires_grad_(True)
        prepared: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, FakeQuantizedLinear)
        }
        check_covered("torchao", matrices, prepared)
        self._quantizers = {n: module.weight_fake_quantizer for n, module in prepared.items()}
        self._affine = affine

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Nothing is learned beside the weights."""
        return {}

    def rounded(self, matrix: Matrix, weight: Tensor) -> Tensor:
        """Return `weight` itself: the module that reads it rounds it."""
        return weight

    def stored(self, matrix: Matrix, weight: Tensor) -> Quantized:
        """Return the codes and scales that the module computes with."""
        quantizer = self._quantizers[matrix.name]
        with torch.no_grad():
            rounded: Tensor = quantizer(weight)
        scale: Tensor = quantizer.scale.detach().reshape(weight.shape[0], -1)
        grouped = rounded.detach().reshape(*scale.shape, -1)
        bits = self._affine.bits
        codes = (grouped / scale.float().unsqueeze(-1)).round() + 2 ** (bits - 1)
        return Quantized(
            codes=codes.to(torch.uint8).flatten(-2),
            scale=scale,
            zero_point=None,
            bits=bits,
            columns=matrix.in_features,
            subnormal_scales=int((scale < torch.finfo(scale.dtype).smallest_normal).sum()),
        )
