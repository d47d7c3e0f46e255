"""The plain PyTorch truth of every op: slow, short, and what each kernel is checked against.

Conventions: weight [out, in] = scale * (code - zero_point). A group is `group_size` consecutive
inputs that share a scale; -1 is the whole row. Symmetric weights have no stored zero point: theirs
is 2**(bits - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.pack import unpack
from kernels.panels import PAIRS, QUADS, panel_shape, unpack_grid, unpack_panels


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return float32 [..., out, in] = scale * (codes - zero_point).

    `codes` is uint8 [..., out, in] with `in` a multiple of the number of groups; `scale` (floating)
    and `zero_point` (uint8, or None: 2**(bits - 1)) are [..., out, groups], where out or groups may
    be 1 and stands for all.
    """
    grouped = codes.reshape(*codes.shape[:-1], scale.shape[-1], -1).float()
    if zero_point is None:
        grouped -= 2 ** (bits - 1)
    else:
        grouped -= zero_point.unsqueeze(-1)
    grouped *= scale.float().unsqueeze(-1)
    return grouped.flatten(-2)


def unpack_zero_point(zero_point: Tensor | None, scale: Tensor, bits: int) -> Tensor | None:
    """Return packed zero points, uint8 [..., bytes], as uint8 of the shape of `scale`.

    They are packed as one row per matrix, [out * groups] flattened, so that padding costs at most
    seven codes a matrix and not seven a row.
    """
    if zero_point is None:
        return None
    count = scale.shape[-2] * scale.shape[-1]
    return unpack(zero_point, bits, count).reshape(scale.shape)


def dequantize_packed(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
) -> Tensor:
    """Return the first `columns` columns of packed weights as float32 [..., out, columns].

    Arguments as in `packed_linear`, with any leading dimensions. Columns beyond are padding.

    Raises:
        ValueError: the scales do not cover `columns`.
    """
    groups = scale.shape[-1]
    width = columns if group_size == -1 else groups * group_size
    if width < columns or (group_size == -1 and groups != 1):
        raise ValueError(
            f"{groups} groups of {group_size} inputs do not cover a row of {columns} weights"
        )
    zeros = unpack_zero_point(zero_point, scale, bits)
    return dequantize(unpack(packed, bits, width), scale, zeros, bits)[..., :columns]


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Multiply x [..., in] by the transpose of packed weights: [..., out] in the type of `x`.

    Shapes and types:
        x: any floating type; `in` is the true width, at most the stored one.
        packed: uint8 [out, packed_bytes(stored width, bits)], as `kernels.pack` lays it out.
        scale: floating [out, groups], or [1, 1] for one scale a matrix.
        zero_point: uint8 [packed_bytes(scale.numel(), bits)], packed like one row; None: symmetric.
        bias: floating [out] or None.

    The weight is dequantized in float32 and rounded to the type of `x`. FP16 on a CPU is computed
    in FP32, because FP16 products are emulated there.
    """
    weight = dequantize_packed(packed, scale, zero_point, bits, group_size, x.shape[-1])
    emulated = x.dtype == torch.float16 and x.device.type == "cpu"
    dtype = torch.float32 if emulated else x.dtype
    bias = None if bias is None else bias.to(dtype)
    return functional.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)


def panel_linear(
    x: Tensor,
    panels: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    rows: int,
    bits: int,
    group_size: int,
    int8: bool,
) -> Tensor:
    """Multiply x [..., in] by the transpose of weights in panels: [..., rows] in the type of `x`.

    Shapes and types:
        panels: uint8 of `kernels.panels.pack_panels`, in quads where `int8`, else in pairs.
        scale: floating, of `kernels.panels.pack_grid`; its size says how many groups there are.
        zero_point: uint8, as `scale`; None: symmetric.
        bias: float32 [rows] or None.
        int8: x is rounded to int8 per token: x = step * code, step = max|x| / 127, half to even.
            Sums are then those of integers; they are computed in float64.
    """
    columns = x.shape[-1]
    width, group = panel_shape(columns, group_size)
    codes = unpack_panels(panels, bits, QUADS if int8 else PAIRS, rows, width)
    scales = unpack_grid(scale, rows, width // group)
    zeros = None if zero_point is None else unpack_grid(zero_point, rows, width // group)
    weight = dequantize(codes, scales, zeros, bits)[:, :columns]
    bias = None if bias is None else bias.double()
    given = x.float()
    if int8:
        step = given.abs().amax(-1, keepdim=True) / 127
        given = (given / step.where(step > 0, 1)).round()
        weight, step = weight.double(), step.double()
        y = functional.linear(given.double(), weight) * step
        return (y if bias is None else y + bias).to(x.dtype)
    return functional.linear(given.double(), weight.double(), bias).to(x.dtype)
