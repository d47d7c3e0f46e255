"""The INT4 layout of the project's documents: read into our codes, and written from them.

Source: the document on INT8 and INT4 (section 3.1, `INT4Quantizer`). A weight [out, in] is
flattened and cut into groups of 128; a byte holds two neighbouring values, the first in the high
nibble (ours, `kernels.pack`, has it in the low one). Each group has a scale and a zero point:
weight = scale * (value - zero_point). Symmetric: values -8 to 7 in two's complement, zero point 0,
scale = max|w| / 7. Asymmetric: values 0 to 15.

The document's reader takes every nibble for a signed one, so its own asymmetric values above 7 come
back 16 too low. Here the caller says which of the two it is, and both come back as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods.affine import Quantized

BITS = 4
MIDDLE = 8
"""What is added to a signed value to make it a code of ours."""


def join_high_first(values: Tensor) -> Tensor:
    """Pack integer values [n], -8 to 7 or 0 to 15, into uint8 [ceil(n / 2)], a last one with 0."""
    nibbles = (values.flatten().to(torch.int16) & 0xF).to(torch.uint8)
    if nibbles.numel() % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    first, second = nibbles.view(-1, 2).unbind(1)
    return (first << 4) | second


def split_high_first(packed: Tensor, signed: bool) -> Tensor:
    """Return the values int8 [2 * n] of uint8 [n]: -8 to 7 where `signed`, else 0 to 15."""
    values = torch.stack([packed >> 4, packed & 0xF], dim=1).flatten().to(torch.int8)
    return torch.where(values >= MIDDLE, values - 2 * MIDDLE, values) if signed else values


def read_int4(result: Mapping[str, Any], symmetric: bool) -> Quantized:
    """Return the matrix of a `result` as the document's `quantize_with_grouping` gives it.

    It has packed_weight uint8 [n / 2], scales and zero_points [groups], original_shape (out, in)
    and group_size.

    Raises:
        ConfigError: a group ends inside a row, or the tensors do not fit the shape.
    """
    rows, columns = (int(size) for size in result["original_shape"])
    size = int(result["group_size"])
    if columns % size:
        raise ConfigError(
            f"rows of {columns} weights are no multiple of group_size {size}: a group would belong "
            "to two rows, which have scales of their own here; choose a group_size that divides it"
        )
    scale, groups = result["scales"].float(), rows * columns // size
    packed, zeros = result["packed_weight"], torch.as_tensor(result["zero_points"])
    if packed.numel() != (rows * columns + 1) // 2 or {scale.numel(), zeros.numel()} != {groups}:
        raise ConfigError(
            f"{packed.numel()} bytes, {scale.numel()} scales and {zeros.numel()} zero points do "
            f"not make a matrix of {rows} x {columns} in groups of {size}"
        )
    if symmetric and bool((zeros != 0).any()):
        raise ConfigError("symmetric values have zero points of 0; read them with symmetric=False")
    values = split_high_first(packed, signed=symmetric)[: rows * columns].view(rows, columns)
    codes = (values + MIDDLE if symmetric else values).to(torch.uint8)
    shape = (rows, columns // size)
    zero_point = None if symmetric else zeros.to(torch.uint8).view(shape)
    return Quantized(codes, scale.view(shape), zero_point, BITS, columns, 0)


def write_int4(quantized: Quantized) -> dict[str, Any]:
    """Return a matrix [out, in] of 4 bits as the document's `quantize_with_grouping` gives it.

    Scales become float32, zero points int64; the scale of a whole matrix is repeated.

    Raises:
        ConfigError: it has other bits than 4, is a stack of matrices, or has padded rows.
    """
    codes = quantized.codes
    if quantized.bits != BITS or codes.ndim != 2 or codes.shape[1] != quantized.columns:
        raise ConfigError(
            f"a matrix of {quantized.bits} bits and shape {list(codes.shape)} has no place in the "
            f"documents' INT4 layout; it takes {BITS} bits, two dimensions and unpadded rows"
        )
    rows, columns = codes.shape
    shape = (rows, quantized.scale.shape[-1])
    symmetric = quantized.zero_point is None
    zeros = torch.zeros(shape) if quantized.zero_point is None else quantized.zero_point
    return {
        "packed_weight": join_high_first(codes.to(torch.int8) - (MIDDLE if symmetric else 0)),
        "scales": quantized.scale.float().expand(shape).flatten(),
        "zero_points": zeros.expand(shape).flatten().to(torch.int64),
        "original_shape": (rows, columns),
        "group_size": columns // shape[1],
    }
