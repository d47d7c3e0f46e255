"""The ops of `quantbench::`, each declared once: schema, plain PyTorch implementation, fake.

A kernel for a device is one more registration on the op declared here, e.g.
`packed_linear.register_kernel("cuda")`. The fakes make the ops usable under `torch.compile` and
on meta tensors. Importing compiles nothing and touches no device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference


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
