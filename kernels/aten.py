"""PyTorch's own packed CPU kernels, and how stored weights are turned into their formats.

Both accept activations in float32, bfloat16 and float16, but only bfloat16 is vectorized: on 4096 x
4096 weights and one token, 4 bits take 0.9 ms in bfloat16, 70 ms in float16, and in float32 15 to
60 times as long at every size and number of tokens, far longer than dequantizing. So activations of
any other type are rounded to bfloat16 here; sums are float32 inside the kernels, results bfloat16.

- `aten::_weight_int4pack_mm_for_cpu`: weight = (code - 8) * scale + offset, groups of 32, 64, 128
  or 256 inputs, rows in blocks of 16. Ours is scale * (code - zero_point), so
  offset = scale * (8 - zero_point), which is 0 where symmetric. Larger groups that 32 divides are
  cut into groups the kernel has, with equal scales; rows and inputs are filled up with zeros. The
  kernel wants scale and offset in the type of the activations, so they are rounded to bfloat16.
- `aten::_weight_int8pack_mm`: weight = int8 * scale, one scale a row. Its scales are left at 1, and
  y = scale * (x @ (code - 128).T - (zero_point - 128) * sum(x)) is finished in float32: scales are
  not rounded, and zero points cost one sum per token. The kernel reads whole vectors of inputs and
  crashes on a row that ends inside one, so rows are filled up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.pack import unpack
from kernels.reference import unpack_zero_point
from kernels.stored import Stored

INT4_GROUPS = (256, 128, 64, 32)
INT4_ROWS = 16
INT4_BLOCK_ROWS = 1024
"""Rows converted at once; a multiple of every row block the kernel uses, so that blocks join."""

DTYPE = torch.bfloat16
"""Type of the activations inside both kernels."""

INT8_INPUTS = 32
"""Rows are filled up to a multiple of this: the widest vector, of bfloat16 in AVX-512."""


class Int4Linear(nn.Module):
    """4-bit weights in the format of the kernel: [..., in] -> [..., out] in the type of x."""

    kernel = "aten::_weight_int4pack_mm_for_cpu"
    dtypes = (DTYPE,)

    @staticmethod
    def refusal(group_size: int) -> str | None:
        """Return what the kernel cannot do for groups of `group_size`, None where it can."""
        if group_size == -1 or group_size % INT4_GROUPS[-1] == 0:
            return None
        return f"takes no groups of {group_size} inputs, only multiples of {INT4_GROUPS[-1]}"

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.out_features, groups = stored.packed.shape[0], stored.scale.shape[-1]
        covered = stored.columns if stored.group_size == -1 else groups * stored.group_size
        self.width = -(-covered // INT4_GROUPS[-1]) * INT4_GROUPS[-1]
        self.group_size = next(size for size in INT4_GROUPS if (self.width // groups) % size == 0)
        self.weight = nn.Buffer(_int4_weight(stored.packed, covered, self.width))
        repeats = self.width // groups // self.group_size
        self.scales = nn.Buffer(_int4_scales(stored, repeats).to(DTYPE))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by the packed weight and add `bias`."""
        rows = _rows(x, self.width)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.weight, self.group_size, self.scales
        )
        y = y[:, : self.out_features].to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias


def _rows(x: Tensor, width: int) -> Tensor:
    """Return x [..., in] as bfloat16 [tokens, width], filled up with zeros."""
    flat = x.flatten(0, -2).to(DTYPE)
    return functional.pad(flat, (0, width - x.shape[-1])).contiguous()


def _int4_weight(packed: Tensor, covered: int, width: int) -> Tensor:
    """Convert packed rows to the kernel's order, some rows at a time: it wants int32 codes."""
    blocks = []
    for start in range(0, packed.shape[0], INT4_BLOCK_ROWS):
        rows = packed[start : start + INT4_BLOCK_ROWS]
        missing = -rows.shape[0] % INT4_ROWS
        codes = functional.pad(unpack(rows, 4, covered), (0, width - covered, 0, missing))
        blocks.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
    return torch.cat(blocks)


def _int4_scales(stored: Stored, repeats: int) -> Tensor:
    """Return scale and offset as float32 [groups * repeats, rows filled up, 2]."""
    scale = stored.scale.float()
    zero_point = unpack_zero_point(stored.zero_point, stored.scale, 4)
    offset = torch.zeros_like(scale) if zero_point is None else scale * (8 - zero_point.float())
    out = stored.packed.shape[0]
    both = torch.stack([scale, offset], dim=-1).expand(out, -1, -1)
    both = functional.pad(both, (0, 0, 0, 0, 0, -out % INT4_ROWS))
    return both.transpose(0, 1).repeat_interleave(repeats, dim=0).contiguous()


class Int8Linear(nn.Module):
    """8-bit weights in the format of the kernel: [..., in] -> [..., out] in the type of x."""

    kernel = "aten::_weight_int8pack_mm"
    dtypes = (DTYPE,)

    @staticmethod
    def refusal(group_size: int) -> str | None:
        """Return what the kernel cannot do for groups of `group_size`, None where it can."""
        if group_size == -1:
            return None
        return f"takes one scale a row, not groups of {group_size} inputs"

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        out = stored.packed.shape[0]
        self.width = -(-stored.columns // INT8_INPUTS) * INT8_INPUTS
        # Flipping the highest bit of a byte subtracts 128 from it, read as a signed number.
        weight = (stored.packed ^ 0x80).view(torch.int8)
        self.weight = nn.Buffer(functional.pad(weight, (0, self.width - stored.columns)))
        self.ones = nn.Buffer(torch.ones(out, dtype=DTYPE, device=weight.device))
        self.scale = nn.Buffer(stored.scale.float().squeeze(-1))
        zero_point = unpack_zero_point(stored.zero_point, stored.scale, 8)
        offset = None if zero_point is None else zero_point.squeeze(-1).float() - 128
        self.offset = None if offset is None else nn.Buffer(offset)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply, take off what the zero points add, scale, and add `bias`."""
        rows = _rows(x, self.width)
        y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.ones).float()
        if self.offset is not None:
            y -= rows.sum(-1, keepdim=True, dtype=torch.float32) * self.offset
        y *= self.scale
        y = y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])
        return y if bias is None else y + bias
