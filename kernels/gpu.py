"""The packed linear maps a card has: weights in the layout of `kernels.fragments`, one op a map.

They are built on any device and compute there: on a processor by the plain PyTorch implementation
of their op, which is slow and meant for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import compiler, device_launch, plans
from kernels.device_ops import fragment_linear, w8a8_linear
from kernels.device_reference import op_words
from kernels.errors import ConfigError
from kernels.fragments import GROUPS, ROWS, STEP, pack_fragments
from kernels.pack import unpack
from kernels.reference import unpack_zero_point
from kernels.stored import Stored

TYPES = tuple(device_launch.DTYPE)
"""Of activations: float16 and bfloat16."""

ROUNDED = torch.bfloat16
"""What activations of a type without a kernel are rounded to: it has the range of float32."""


class PackedLinear(nn.Module):
    """Packed weights of 8, 4, 3 or 2 bits: [..., in] -> [..., out] in the type of x.

    Activations are float16 or bfloat16; those of another type are rounded to bfloat16. Scales of
    groups are rounded to float16 relative to their row's largest, which changes none that is
    float16 or bfloat16 and above 2**-14 of it (`kernels.fragments.pack_fragments`).

    Attributes:
        counters: zeros by which blocks count themselves: one stream at a time.
    """

    kernel = "quantbench::fragment_linear"
    dtypes = TYPES

    @staticmethod
    def refusal(group_size: int) -> str | None:
        """Return what the kernel cannot do for groups of `group_size`, None where it can."""
        if group_size in (-1, *GROUPS) or (group_size > 0 and group_size % STEP == 0):
            return None
        return f"takes no groups of {group_size} inputs, only 32, 64, multiples of {STEP} and -1"

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.bits, self.columns = stored.bits, stored.columns
        self.out_features = stored.packed.shape[0]
        zeros = unpack_zero_point(stored.zero_point, stored.scale, stored.bits)
        codes = unpack(stored.packed, stored.bits, stored.columns)
        packed = pack_fragments(codes, stored.scale, zeros, stored.bits, stored.group_size)
        self.group_size = packed.group_size
        self.words = nn.Buffer(op_words(packed))
        self.row_scale = nn.Buffer(packed.row_scale[: self.out_features].clone())
        self.scale = None if packed.scale is None else nn.Buffer(packed.scale)
        self.zero_point = None if packed.zero_point is None else nn.Buffer(packed.zero_point)
        count = plans.most_counters((self.out_features, self.columns))
        device = packed.words.device
        self.counters = nn.Buffer(torch.zeros(count, dtype=torch.int32, device=device))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by the packed weight, and add `bias` ([out], in the type of x)."""
        given = x.dtype
        if given not in TYPES:
            x, bias = x.to(ROUNDED), None if bias is None else bias.to(ROUNDED)
        # Calling an op costs more than launching a kernel: only a graph of the compiler's needs it.
        eager = x.is_cuda and not torch.compiler.is_compiling()
        multiply = device_launch.fragment_linear if eager else fragment_linear
        y: Tensor = multiply(
            x, self.words, self.row_scale, self.scale, self.zero_point, bias, self.counters
        )
        return y.to(given)

    def registers(self, tokens: int, dtype: torch.dtype = ROUNDED) -> int | None:
        """Return the registers of the kernel that multiplies `tokens` tokens.

        None where the weights are on no card, or the vendor's library multiplies.
        """
        if not self.words.is_cuda or tokens >= plans.VENDOR_TOKENS:
            return None
        packed = device_launch.Format(
            self.bits,
            self.group_size,
            self.zero_point is not None,
            self.out_features,
            self.columns,
        )
        with torch.cuda.device(self.words.device):
            return device_launch.linear_kernel(packed, tokens, dtype).resources.registers


class Int8ActivationLinear(nn.Module):
    """Int8 weights, one scale a row, times activations rounded to int8 token by token.

    [..., in] -> [..., out] in the type of x; types as in `PackedLinear`.
    """

    kernel = "quantbench::w8a8_linear"
    dtypes = PackedLinear.dtypes

    @staticmethod
    def refusal(group_size: int) -> str | None:
        """Return what the kernel cannot do for groups of `group_size`, None where it can."""
        if group_size == -1:
            return None
        return f"takes one scale a row, not groups of {group_size} inputs"

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        refusal = self.refusal(stored.group_size)
        if refusal is not None or stored.zero_point is not None or stored.bits != 8:
            cause = refusal or "takes symmetric weights of 8 bits"
            raise ConfigError(f"{self.kernel} {cause}")
        out = stored.packed.shape[0]
        self.columns = stored.columns
        # Flipping the highest bit of a byte subtracts 128 from it, read as a signed number.
        weight = (stored.packed[:, : self.columns] ^ 0x80).view(torch.int8)
        filled = (0, -self.columns % device_launch.ALIGNMENT, 0, -out % ROWS)
        self.weight = nn.Buffer(functional.pad(weight, filled))
        self.scale = nn.Buffer(stored.scale.float().expand(out, 1).flatten().contiguous())

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Round x per token, multiply, and add `bias` ([out], in the type of x)."""
        given = x.dtype
        if given not in TYPES:
            x, bias = x.to(ROUNDED), None if bias is None else bias.to(ROUNDED)
        eager = x.is_cuda and not torch.compiler.is_compiling()
        multiply = device_launch.w8a8_linear if eager else w8a8_linear
        y: Tensor = multiply(x, self.weight, self.scale, bias)
        return y.to(given)


PACKED_LINEARS: dict[int, type[PackedLinear]] = dict.fromkeys((8, 4, 3, 2), PackedLinear)
"""Bits -> the packed linear map of a card."""

INT8_ACTIVATION_LINEARS: dict[int, type[Int8ActivationLinear]] = {8: Int8ActivationLinear}
"""Bits of the weights -> the linear map of a card whose activations are rounded to int8."""


def linear_of(bits: int) -> tuple[type[PackedLinear] | None, str]:
    """Return the packed linear map of `bits` on a card, or None; and why it cannot be compiled."""
    linear, reason = PACKED_LINEARS.get(bits), compiler.unavailable()
    return (linear, "") if linear is None or reason is None else (None, reason)
