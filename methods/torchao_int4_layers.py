"""The modules of `torchao_int4`: what lies in the artefact, and what runs it.

`StoredInt4` holds plain tensors and never runs; the others are made from it when an artefact is
loaded. Conventions: see `methods/torchao_int4.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.pack import unpack
from methods.artefact import Facts

DTYPE = torch.bfloat16
"""Of the weights that are rounded, of their scales, and of activations in the packed kernel."""

INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009  # missing from the stubs of PyTorch
MIDDLE = 8
"""Code of the middle of the range: 0 where there is no offset."""


class StoredInt4(nn.Module):
    """A linear map as it lies in the artefact; it never runs.

    packed uint8 [out, in / 2], scale and offset (or None) bfloat16 [out, groups], bias in any float
    [out].
    """

    def __init__(
        self, packed: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.packed = nn.Buffer(packed)
        self.scale = nn.Buffer(scale)
        self.offset = nn.Buffer(offset) if offset is not None else None
        self.bias = nn.Buffer(bias) if bias is not None else None

    @classmethod
    def empty(cls, facts: Facts) -> StoredInt4:
        """Return the module that `facts` describe, without values (on meta)."""
        out_features, in_features = facts["out_features"], facts["in_features"]
        groups = in_features // facts["group_size"]
        with torch.device("meta"):
            scale = torch.empty(out_features, groups, dtype=DTYPE)
            return cls(
                torch.empty(out_features, in_features // 2, dtype=torch.uint8),
                scale,
                torch.empty_like(scale) if facts["offset"] else None,
                torch.empty(out_features) if facts["bias"] is not None else None,
            )

    @property
    def in_features(self) -> int:
        """Width of a row."""
        return 2 * self.packed.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // self.scale.shape[1]

    def codes(self) -> Tensor:
        """Return the codes 0..15, uint8 [out, in]."""
        return unpack(self.packed, 4, self.in_features)

    def decode(self) -> Tensor:
        """Return the weight, float32 [out, in]."""
        codes = self.codes()
        q = codes.view(*self.scale.shape, self.group_size).float() - MIDDLE
        weight: Tensor = q * self.scale.float()[..., None]
        if self.offset is not None:
            weight += self.offset.float()[..., None]
        return weight.view(codes.shape)


class OpaqueLinear(nn.Module):
    """torchao's `Int4OpaqueTensor` as a weight: any float [..., in] -> the same type [..., out].

    Activations are rounded to bfloat16 for the kernel; the bias is added in their own type.
    """

    def __init__(self, stored: StoredInt4, dtype: torch.dtype) -> None:
        super().__init__()
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor

        assert stored.offset is not None
        codes = stored.codes()
        both = torch.stack([stored.scale, stored.offset], dim=-1).transpose(0, 1)
        tensor = Int4OpaqueTensor(
            qdata=torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1),
            scale_and_zero=both.contiguous(),
            block_size=[1, stored.group_size],
            shape=codes.shape,
        )
        self.weight = nn.Parameter(tensor, requires_grad=False)
        self.bias = nn.Buffer(stored.bias.to(dtype)) if stored.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the packed weight and add the bias."""
        y = functional.linear(x.to(DTYPE), self.weight).to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)


def opaque_codes(weight: Any) -> Tensor:
    """Return the codes 0..15 of an `Int4OpaqueTensor`, uint8 [out, in].

    Their order in memory is the kernel's secret and differs between processors. So the kernel is
    asked: with scale 1 and offset 8 it multiplies by the codes, here each by a single 1, exactly.
    """
    group_size = weight.block_size[1]
    out_features, in_features = weight.shape
    unit = torch.ones(in_features // group_size, out_features, 2, dtype=DTYPE)
    unit[..., 1] = MIDDLE
    ones = torch.eye(in_features, dtype=DTYPE)
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        ones, weight.qdata, group_size, unit
    )
    return product.T.to(torch.uint8)


def unpacked_linear(stored: StoredInt4, dtype: torch.dtype) -> nn.Linear:
    """Return an `nn.Linear` whose weight is torchao's `IntxUnpackedToInt8Tensor`."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    weight = IntxUnpackedToInt8Tensor(
        qdata=stored.codes().to(torch.int8) - MIDDLE,
        scale=stored.scale.to(dtype),
        zero_point=torch.zeros_like(stored.scale, dtype=torch.int8),
        target_dtype=INT4,
        block_size=(1, stored.group_size),
        dtype=dtype,
        activation_quantization="int8_asym_per_token",
    )
    return floating_linear(weight, stored.bias, dtype)


class RoundedLinear(nn.Linear):
    """A linear map of plain floats that rounds each token of its input to asymmetric INT8."""

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` [..., in] as torchao does, computed anew here, and multiply."""
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        step = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).smallest_normal)
        zero_point = (-128 - (low / step).round()).clamp(-128, 127)
        q = ((x / step).round() + zero_point).clamp(-128, 127)
        return super().forward((q - zero_point) * step)


def floating_linear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, kind: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    """Return a linear map of class `kind` with `weight` [out, in], its bias in `dtype`."""
    out_features, in_features = weight.shape
    linear = kind(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear
