"""Contenders on a card: PyTorch's own ops, our kernels, and other libraries.

Our kernels are found as on a processor: a module with `PACKED_LINEARS`, bits -> a class with
`refusal(group_size)`, made from a `kernels.stored.Stored` on the card; its method `registers` says
what the kernel for a number of tokens takes.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from kernels.bench_core import Contender, Given, Prepared, codes_of, held_bytes, zeros_of
from kernels.bench_cpu import INT_MM, own_linear, unquantized
from kernels.bench_peers import CARD_LIBRARIES, LIBRARIES
from kernels.stored import Stored

OURS = "kernels.gpu"
"""Module of our packed linears on a card."""

INT4_TILES = 8
INT4_GROUPS = (32, 64, 128, 256)


def packed(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare this project's packed linear of a card, with the registers of its kernels."""
    ours = importlib.import_module(OURS)
    rounded = given.scheme.activation_bits == 8
    table = ours.INT8_ACTIVATION_LINEARS if rounded else ours.PACKED_LINEARS
    prepared = own_linear(table.get(given.scheme.bits), given)
    registers = None if isinstance(prepared, str) else getattr(prepared.module, "registers", None)
    if isinstance(prepared, str) or registers is None:
        return prepared
    return replace(prepared, registers=partial(registers, dtype=dtype))


class Int4Op(nn.Module):
    """`_weight_int4pack_mm`, the tinygemm kernel: bfloat16 only, scale * (code - 8) + offset."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.group_size = stored.group_size
        codes = codes_of(stored)
        # Of two codes in a byte, this op has the first in the high bits.
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        self.weight = nn.Buffer(torch.ops.aten._convert_weight_to_int4pack(pairs, INT4_TILES))
        scale = stored.scale.float()
        both = torch.stack([scale, scale * (8 - zeros_of(stored).float())], dim=-1)
        self.scales = nn.Buffer(both.to(torch.bfloat16).transpose(0, 1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the packed weight."""
        y: Tensor = torch.ops.aten._weight_int4pack_mm(
            x.to(torch.bfloat16), self.weight, self.group_size, self.scales
        )
        return y.to(x.dtype)


def int4_op(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare PyTorch's int4 op; other activations than bfloat16 are rounded to it."""
    out, columns = given.weight.shape
    if given.scheme.group_size not in INT4_GROUPS or out % 8 or columns % (16 * INT4_TILES):
        return f"takes multiples of 8 rows and {16 * INT4_TILES} inputs, groups of 32 to 256"
    module = Int4Op(given.codes)
    note = "" if dtype == torch.bfloat16 else "activations rounded to bfloat16"
    return Prepared(module, held_bytes(module), note)


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


def float8_product(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare `_scaled_mm`; both sides in multiples of 16, cards from sm_89 on."""
    weight = given.weight
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
        zero_points=True,
        activation_bits=(16, 8),
    ),
    Contender("torch _weight_int4pack_mm", "peer", (4,), int4_op, zero_points=True),
    INT_MM,
    Contender("torch _scaled_mm", "peer", (8,), float8_product, activation_bits=(8,)),
    *LIBRARIES,
    *CARD_LIBRARIES,
)
