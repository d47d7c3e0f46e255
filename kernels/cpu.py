"""The packed linear maps of a processor: the C kernels of `kernels/c`, for 8, 4, 3 and 2 bits.

Activations in bfloat16 are multiplied as they are. float32 and float16 are split into two bfloat16
parts, which hold 16 bits of the fraction: all of a float16's, and 16 of a float32's 24. Sums are
float32. What one token gets does not depend on how many are multiplied beside it.

Where the C kernels cannot be built, `linear_of` gives PyTorch's own ops, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import aten, choice, host_build, host_linear
from kernels.decode_step import Weights
from kernels.ops import panel_linear, panel_linear_in_c
from kernels.pack import unpack
from kernels.panels import PAIRS, QUADS, STEP, Order, pack_grid, pack_panels, panel_shape
from kernels.reference import unpack_zero_point
from kernels.stored import Stored

MOST_INPUTS = 65536
"""Of a group whose products are added up in int32: 255 * 127 times as many stay below 2**31."""


class PanelLinear(nn.Module):
    """Weights of 8, 4, 3 or 2 bits in panels: [..., in] -> [..., out] in the type of x.

    Attributes:
        choice: JSON facts of what multiplies many tokens, once `choose` was called; empty: C.
    """

    kernel = "quantbench::panel_linear (C)"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    order: Order = PAIRS

    @classmethod
    def refusal(cls, group_size: int) -> str | None:
        """Return what the kernel cannot do for groups of `group_size`, None where it can."""
        if group_size == -1 or (group_size > 0 and group_size % STEP == 0):
            return None
        return f"takes no groups of {group_size} inputs, only multiples of {STEP} and -1"

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.bits, self.columns, self.group_size = stored.bits, stored.columns, stored.group_size
        self.out_features = stored.packed.shape[0]
        width, group = panel_shape(self.columns, self.group_size)
        if self.order == QUADS and group > MOST_INPUTS:
            raise ValueError(f"groups of {group} inputs; int8 sums hold at most {MOST_INPUTS}")
        covered = self.columns if self.group_size == -1 else width
        codes = functional.pad(unpack(stored.packed, self.bits, covered), (0, width - covered))
        zeros = unpack_zero_point(stored.zero_point, stored.scale, self.bits)
        groups = (self.out_features, width // group)
        self.weight = nn.Buffer(
            host_linear.in_large_pages(pack_panels(codes, self.bits, self.order))
        )
        self.scale = nn.Buffer(pack_grid(stored.scale.expand(groups)))
        self.zero_point = None if zeros is None else nn.Buffer(pack_grid(zeros.expand(groups)))
        self.choice: dict[str, Any] = {}

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by the packed weight; the sums and `bias` are added in float32."""
        held = None if bias is None else bias.float().contiguous()
        if not torch.compiler.is_compiling() and self._in_library(x):
            matrix, flat = self.in_c(x.dtype).matrix, x.reshape(-1, self.columns)
            product = choice.through_library(matrix, flat.to(choice.library_type(x.dtype)))
            product = product if held is None else product + held
            return product.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        # Calling an op costs as much time as a small matrix: only a graph needs it.
        multiply = panel_linear if torch.compiler.is_compiling() else panel_linear_in_c
        y: Tensor = multiply(
            x,
            self.weight,
            self.scale,
            self.zero_point,
            held,
            self.out_features,
            self.bits,
            self.group_size,
            self.order == QUADS,
        )
        return y

    def choose(self, dtype: torch.dtype) -> None:
        """Decide what multiplies how many tokens of `dtype`: see `kernels.choice`."""
        if self.order == PAIRS:
            self.choice = choice.choose(self.in_c(dtype).matrix, dtype)

    def _in_library(self, x: Tensor) -> bool:
        first = self.choice.get("library_from")
        return first is not None and x.numel() >= first * self.columns

    def in_c(self, dtype: torch.dtype, bias: Tensor | None = None) -> Weights:
        """Return it for a C caller with activations of `dtype`; it reads this module's buffers."""
        held = None if bias is None else bias.float().contiguous()
        matrix = host_linear.panel_matrix(
            self.columns,
            self.weight,
            self.scale,
            self.zero_point,
            held,
            (self.out_features, *panel_shape(self.columns, self.group_size), self.bits),
            host_linear.INT8 if self.order == QUADS else host_linear.activation_of(dtype),
        )
        return Weights(matrix, (self, held))


class Int8ActivationLinear(PanelLinear):
    """As `PanelLinear`, with activations rounded to int8 per token; products in integers.

    The step of a token is its largest absolute value / 127; codes are rounded half to even.
    """

    kernel = "quantbench::panel_linear (C, int8 activations)"
    order: Order = QUADS


Linear = PanelLinear | aten.Int4Linear | aten.Int8Linear

PACKED_LINEARS: Mapping[int, type[PanelLinear]] = dict.fromkeys((8, 4, 3, 2), PanelLinear)
"""Bits -> the packed linear map; bits that are not here have none."""

INT8_ACTIVATION_LINEARS: Mapping[int, type[Int8ActivationLinear]] = dict.fromkeys(
    (8, 4, 3, 2), Int8ActivationLinear
)
"""Bits of the weights -> the linear map whose activations are rounded to int8."""

WITHOUT_COMPILER: Mapping[int, type[aten.Int4Linear] | type[aten.Int8Linear]] = {
    4: aten.Int4Linear,
    8: aten.Int8Linear,
}


def linear_of(bits: int) -> tuple[type[Linear] | None, str]:
    """Return the packed linear map of `bits` on this machine, or None; and why it is not in C."""
    if bits not in PACKED_LINEARS:
        return None, ""
    reason = host_build.unavailable()
    if reason is None:
        return PACKED_LINEARS[bits], ""
    return WITHOUT_COMPILER.get(bits), reason
