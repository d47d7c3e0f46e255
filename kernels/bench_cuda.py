"""Contenders on a card: PyTorch's own ops, our kernels, and other libraries.

Our kernels are found as on a processor: a module with `PACKED_LINEARS`, bits -> a class with
`refusal(group_size)`, made from a `kernels.stored.Stored` on the card, and `registers` where known.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from kernels.bench_core import Contender, Prepared, codes_of, held_bytes, quantize
from kernels.bench_cpu import unquantized
from kernels.bench_peers import CARD_LIBRARIES, LIBRARIES
from kernels.stored import Stored

OURS = "kernels.gpu"
"""Module of our packed linears on a card."""

INT4_TILES = 8
INT4_GROUPS = (32, 64, 128, 256)
INT_MM_TOKENS = 17
"""The least number of tokens that `torch._int_mm` takes."""


def packed(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Prepared | str:
    """Prepare this project's packed linear of a card."""
    linear = importlib.import_module(OURS).PACKED_LINEARS.get(bits)
    if linear is None:
        return f"no packed kernel for {bits} bits"
    refusal = linear.refusal(group_size)
    if refusal is not None:
        return f"{linear.kernel} {refusal}"
    module = linear(quantize(weight, bits, group_size))
    return Prepared(module, held_bytes(module), registers=getattr(module, "registers", None))


class Int4Op(nn.Module):
    """`_weight_int4pack_mm`, the tinygemm kernel: bfloat16 only."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.group_size = stored.group_size
        codes = codes_of(stored)
        # Of two codes in a byte, this op has the first in the high bits.
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        self.weight = nn.Buffer(torch.ops.aten._convert_weight_to_int4pack(pairs, INT4_TILES))
        scale = stored.scale.to(torch.bfloat16)
        both = torch.stack([scale, torch.zeros_like(scale)], dim=-1)
        self.scales = nn.Buffer(both.transpose(0, 1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the packed weight."""
        y: Tensor = torch.ops.aten._weight_int4pack_mm(
            x.to(torch.bfloat16), self.weight, self.group_size, self.scales
        )
        return y.to(x.dtype)


def int4_op(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Prepared | str:
    """Prepare PyTorch's int4 op; other activations than bfloat16 are rounded to it."""
    out, columns = weight.shape
    if group_size not in INT4_GROUPS or out % 8 or columns % (16 * INT4_TILES):
        return f"takes multiples of 8 rows and {16 * INT4_TILES} inputs, groups of 32 to 256"
    module = Int4Op(quantize(weight, bits, group_size))
    note = "" if dtype == torch.bfloat16 else "activations rounded to bfloat16"
    return Prepared(module, held_bytes(module), note)


class Int8Product(nn.Module):
    """`_int_mm` on activations rounded per token at each call."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.weight = nn.Buffer((codes_of(stored).short() - 128).to(torch.int8))
        self.scale = nn.Buffer(stored.scale.flatten().float())

    def forward(self, x: Tensor) -> Tensor:
        """Round x per token, multiply, scale; fewer tokens than the op takes are filled up."""
        tokens = x.shape[0]
        step = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 127
        rounded = (x / step).round().to(torch.int8)
        if tokens < INT_MM_TOKENS:
            missing = INT_MM_TOKENS - tokens
            rounded = nn.functional.pad(rounded, (0, 0, 0, missing))
        y = torch._int_mm(rounded, self.weight.t())[:tokens]
        return (y * step * self.scale).to(x.dtype)


def int8_product(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Prepared | str:
    """Prepare `_int_mm`; both sides in multiples of 8."""
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return "takes multiples of 8 rows and inputs"
    module = Int8Product(quantize(weight, bits, group_size))
    return Prepared(module, held_bytes(module), "activations rounded to 8 bits, unfused")


class Float8Product(nn.Module):
    """`_scaled_mm` in 8-bit floating point, one scale a matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        largest = torch.finfo(torch.float8_e4m3fn).max
        self.largest = largest
        self.scale = nn.Buffer((weight.abs().max() / largest).float())
        self.weight = nn.Buffer((weight / self.scale).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        """Round x with one scale, and multiply."""
        step = (x.abs().max().float() / self.largest).clamp_min(1e-12)
        rounded = (x / step).to(torch.float8_e4m3fn)
        return torch._scaled_mm(
            rounded, self.weight.t(), scale_a=step, scale_b=self.scale, out_dtype=x.dtype
        )


def float8_product(
    weight: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Prepared | str:
    """Prepare `_scaled_mm`; both sides in multiples of 16, cards from sm_89 on."""
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return "takes multiples of 16 rows and inputs"
    if torch.cuda.get_device_capability() < (8, 9):
        return "needs a card of sm_89 or newer"
    module = Float8Product(weight)
    note = "8-bit floating point on both sides, a grid of its own, unfused"
    return Prepared(module, held_bytes(module), note)


CONTENDERS = (
    Contender("torch linear", "baseline", (16,), unquantized),
    Contender(
        "quantbench",
        "ours",
        (8, 4, 3, 2),
        packed,
        OURS,
        "this version has no kernels for a card",
    ),
    Contender("torch _weight_int4pack_mm", "peer", (4,), int4_op),
    Contender("torch _int_mm", "peer", (8,), int8_product),
    Contender("torch _scaled_mm", "peer", (8,), float8_product),
    *LIBRARIES,
    *CARD_LIBRARIES,
)
