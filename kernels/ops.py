"""The ops of `quantbench::`, each declared once: schema, plain PyTorch implementation, fake.

A kernel for a device is one more registration on the op declared here, e.g.
`packed_linear.register_kernel("cuda")`. The fakes make the ops usable under `torch.compile` and
on meta tensors. Importing compiles nothing and touches no device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import host_linear, reference
from kernels.panels import panel_shape


@torch.library.custom_op("quantbench::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Multiply x [..., in] by packed weights: [..., out]; see `kernels.reference.packed_linear`."""
    return reference.packed_linear(x, packed, scale, zero_point, bias, bits, group_size)


@packed_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("quantbench::panel_linear", mutates_args=())
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
    """Multiply x [..., in] by weights in panels: [..., rows]; see `reference.panel_linear`."""
    return reference.panel_linear(x, panels, scale, zero_point, bias, rows, bits, group_size, int8)


@panel_linear.register_kernel("cpu")
def panel_linear_in_c(
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
    """Multiply by the C kernels.

    Raises:
        HostBuildError: they cannot be built on this machine.
    """
    columns = x.shape[-1]
    matrix = host_linear.panel_matrix(
        columns,
        panels,
        scale,
        zero_point,
        bias,
        (rows, *panel_shape(columns, group_size), bits),
        host_linear.INT8 if int8 else host_linear.activation_of(x.dtype),
    )
    y = host_linear.multiply(matrix, x.reshape(-1, columns))
    return y.to(x.dtype).reshape(*x.shape[:-1], rows)


@panel_linear.register_fake
def _(
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
    return x.new_empty((*x.shape[:-1], rows))
