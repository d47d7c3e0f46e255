"""Contenders on a processor: PyTorch's own ops, our packed linears, llama.cpp, other libraries."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import aten, bench_ggml, cpu, host_build
from kernels.bench_core import Contender, Given, Prepared, codes_of, held_bytes, zeros_of
from kernels.bench_peers import LIBRARIES
from kernels.stored import Stored

INT_MM_TOKENS = 17
"""The least number of tokens that `torch._int_mm` takes on a card."""


class Linear(nn.Module):
    """An unquantized weight in the type of the activations."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight."""
        return functional.linear(x, self.weight)


def unquantized(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Keep the weight in the type of the activations."""
    module = Linear(given.weight, dtype)
    return Prepared(module, held_bytes(module))


def packed(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare this project's packed linear of a processor."""
    bits = given.scheme.bits
    if given.scheme.activation_bits == 16:
        linear, remark = cpu.linear_of(bits)
        prepared = own_linear(linear, given)
        return prepared if isinstance(prepared, str) else replace(prepared, note=remark)
    reason = host_build.unavailable()
    return reason or own_linear(cpu.INT8_ACTIVATION_LINEARS.get(bits), given)


def own_linear(linear: Any, given: Given) -> Prepared | str:
    """Prepare one of our packed linear maps, made of the stored weight; None is a refusal.

    Its weights can lie in pages of their own, which a deep copy would not have.
    """
    if linear is None:
        return f"no packed kernel for {given.scheme.name}"
    refusal = linear.refusal(given.scheme.group_size)
    if refusal is not None:
        return f"{linear.kernel} {refusal}"
    made = linear(given.codes)
    again = partial(linear, given.codes)
    return Prepared(made, held_bytes(made), kernel=lambda tokens: str(made.kernel), again=again)


class Int4Op(nn.Module):
    """`_weight_int4pack_mm_for_cpu` as it is: no padding, scales in the type of the activations.

    Its weight is scale * (code - 8) + offset.
    """

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        super().__init__()
        self.group_size = stored.group_size
        codes = codes_of(stored).int()
        self.weight = nn.Buffer(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        scale = stored.scale.float()
        both = torch.stack([scale, scale * (8 - zeros_of(stored).float())], dim=-1).to(dtype)
        self.scales = nn.Buffer(both.transpose(0, 1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the packed weight."""
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.weight, self.group_size, self.scales
        )
        return y


def int4_op(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare PyTorch's int4 op; it wants rows in blocks of 16 and whole groups."""
    (out, columns), group_size = given.weight.shape, given.scheme.group_size
    if out % aten.INT4_ROWS or columns % group_size or group_size not in aten.INT4_GROUPS:
        return f"takes multiples of {aten.INT4_ROWS} rows and whole groups of 32 to 256 inputs"
    module = Int4Op(given.codes, dtype)
    return Prepared(module, held_bytes(module))


class Int8Op(nn.Module):
    """`_weight_int8pack_mm` as it is: scales in the type of the activations."""

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Buffer((codes_of(stored).short() - 128).to(torch.int8))
        self.scales = nn.Buffer(stored.scale.flatten().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the packed weight."""
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
        return y


def int8_op(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare PyTorch's int8 op; it crashes on a row that ends inside one of its vectors."""
    if given.weight.shape[1] % aten.INT8_INPUTS or given.scheme.group_size != -1:
        return f"takes multiples of {aten.INT8_INPUTS} inputs, and one scale a row"
    module = Int8Op(given.codes, dtype)
    return Prepared(module, held_bytes(module))


class Int8Product(nn.Module):
    """`_int_mm` on activations rounded per token at each call, unfused, on either device."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.weight = nn.Buffer((codes_of(stored).short() - 128).to(torch.int8))
        self.scale = nn.Buffer(stored.scale.flatten().float())

    def forward(self, x: Tensor) -> Tensor:
        """Round x per token, multiply, scale; fewer tokens than the op takes are filled up."""
        tokens = x.shape[0]
        step = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 127
        rounded = (x / step).round().to(torch.int8)
        if tokens < INT_MM_TOKENS and x.is_cuda:
            rounded = functional.pad(rounded, (0, 0, 0, INT_MM_TOKENS - tokens))
        y = torch._int_mm(rounded, self.weight.t())[:tokens]
        return (y * step * self.scale).to(x.dtype)


def int8_product(given: Given, dtype: torch.dtype) -> Prepared | str:
    """Prepare `_int_mm`; both sides in multiples of 8."""
    if given.weight.shape[0] % 8 or given.weight.shape[1] % 8:
        return "takes multiples of 8 rows and inputs"
    module = Int8Product(given.codes)
    return Prepared(module, held_bytes(module), "activations rounded to 8 bits, unfused")


OURS = Contender(
    "quantbench", "ours", (8, 4, 3, 2), packed, zero_points=True, activation_bits=(16, 8)
)
INT_MM = Contender("torch _int_mm", "peer", (8,), int8_product, activation_bits=(8,))

CONTENDERS = (
    Contender("torch linear", "baseline", (16,), unquantized),
    OURS,
    Contender("torch _weight_int4pack_mm_for_cpu", "peer", (4,), int4_op, zero_points=True),
    Contender("torch _weight_int8pack_mm", "peer", (8,), int8_op),
    INT_MM,
    *bench_ggml.CONTENDERS,
    *LIBRARIES,
)
