"""The ops of `quantbench::` that a card has kernels for, each declared once.

Schema, plain PyTorch implementation (`kernels.device_reference`), fake, and the registration of the
CUDA kernels (`kernels.device_launch`), which are compiled at the first call on a card. On a card an
op allocates its result and scratch from PyTorch's allocator, waits for nothing and runs on the
current stream, so it can be captured in a CUDA graph once it has run with these shapes before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import device_launch
from kernels import device_reference as reference
from kernels import pack as packing


@torch.library.custom_op("quantbench::fragment_linear", mutates_args=(), device_types="cpu")
def fragment_linear(
    x: Tensor,
    words: Tensor,
    row_scale: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
) -> Tensor:
    """Multiply x [..., in] by packed weights in the CUDA layout: [..., out] in the type of `x`.

    Shapes and types (`scale`, `zero_point`: see `kernels.fragments.Fragments`):
        x: float16 or bfloat16 (on a processor any floating type).
        words: int32 [n_tiles, k_tiles, units, 16 * bits] (`kernels.device_reference.op_words`).
        row_scale: float32 [out].
        bias: [out] in the type of `x`, or None.
        counters: int32 [`kernels.plans.most_counters`], zero before and after. Blocks that share a
            sum count themselves there, so two calls with the same ones must not overlap: a matrix
            is multiplied on one stream at a time.
    """
    return reference.fragment_linear(x, words, row_scale, scale, zero_point, bias)


@fragment_linear.register_fake
def _(
    x: Tensor,
    words: Tensor,
    row_scale: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_scale.shape[0]))


fragment_linear.register_kernel("cuda", device_launch.fragment_linear)


@torch.library.custom_op("quantbench::w8a8_linear", mutates_args=(), device_types="cpu")
def w8a8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x [..., in], rounded to int8 token by token, by int8 weights: [..., out].

    y = scale * step * sum(weight * code) + bias, where step = max |x| / 127 of the token and
    code = round(x / step); the sum is exact.

    Shapes and types:
        x: float16 or bfloat16 (on a processor any floating type); the result has its type.
        weight: int8 [rows, columns], rows at least `out` and on a card a multiple of 8, columns at
            least `in` and on a card a multiple of 16; what is beyond does not count.
        scale: float32 [out].
        bias: [out] in the type of `x`, or None.
    """
    return reference.w8a8_linear(x, weight, scale, bias)


@w8a8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


w8a8_linear.register_kernel("cuda", device_launch.w8a8_linear)


@torch.library.custom_op("quantbench::quantize_pack", mutates_args=(), device_types="cpu")
def quantize_pack(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a matrix [out, in] to `bits` by the range of each group, and pack it.

    Returns:
        packed: uint8 [out, packed bytes of a row], layout version 1 of `kernels.pack`; groups that
            reach beyond the row are filled up with zeros.
        scale: float16 [out, groups]; infinite where float16 has no such number, for the caller to
            refuse.
        zero_point: uint8 [out, groups], [0, groups] where symmetric.

    Weights are float16, bfloat16 or float32, and finite. Groups have a multiple of 8 inputs; -1 is
    the whole row.

    Raises:
        ConfigError: there is no such format.
    """
    return reference.quantize_pack(weight, bits, group_size, symmetric)


@quantize_pack.register_fake
def _(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    out = weight.shape[0]
    groups, size = reference.grouping(weight.shape[1], bits, group_size)
    return (
        weight.new_empty((out, packing.packed_bytes(groups * size, bits)), dtype=torch.uint8),
        weight.new_empty((out, groups), dtype=torch.float16),
        weight.new_empty((0 if symmetric else out, groups), dtype=torch.uint8),
    )


quantize_pack.register_kernel("cuda", device_launch.quantize_pack)


@torch.library.custom_op("quantbench::unpack", mutates_args=(), device_types="cpu")
def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Return the first `width` codes of each packed row, uint8 [..., width].

    Layout version 1 of `kernels.pack`; the result is a copy.

    Raises:
        ValueError: the rows hold fewer codes.
    """
    return packing.unpack(packed, bits, width).clone(memory_format=torch.contiguous_format)


@unpack.register_fake
def _(packed: Tensor, bits: int, width: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], width))


unpack.register_kernel("cuda", device_launch.unpack)
