"""Packed storage of ternary weights: five values of -1, 0 and 1 in a byte, 1.6 bits each.

3**5 = 243 fits a byte, so a byte is the number whose base-3 digits are five weights plus one, the
first weight the lowest digit. That is 1.6 bits a weight, where log2(3) = 1.585 is the least there
can be. A row that does not fill its last byte is padded with zero weights. Bytes above 242 occur
in no packed tensor.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

VALUES_PER_BYTE = 5
BYTES_USED = 3**VALUES_PER_BYTE
"""How many of the 256 bytes stand for five values."""


def packed_bytes(width: int) -> int:
    """Return the bytes that a row of `width` ternary values takes."""
    return -(-width // VALUES_PER_BYTE)


def pack(values: Tensor) -> Tensor:
    """Pack int8 values -1, 0, 1 [..., width] into uint8 [..., packed_bytes(width)].

    Raises:
        ValueError: the values are not int8, or one of them is none of the three.
    """
    if values.dtype != torch.int8:
        raise ValueError(f"ternary values must be int8, not {values.dtype}")
    if values.numel() and (int(values.min()) < -1 or int(values.max()) > 1):
        raise ValueError(
            f"values from {int(values.min())} to {int(values.max())} are not ternary: -1, 0, 1"
        )
    width = values.shape[-1]
    padded = functional.pad(values, (0, packed_bytes(width) * VALUES_PER_BYTE - width))
    digits = (padded + 1).to(torch.uint8).view(*values.shape[:-1], -1, VALUES_PER_BYTE)
    packed: Tensor = digits[..., -1]
    for place in reversed(range(VALUES_PER_BYTE - 1)):
        packed = packed * 3 + digits[..., place]
    return packed


def unpack(packed: Tensor, width: int) -> Tensor:
    """Return the first `width` values of each row, int8 [..., width], of uint8 [..., bytes].

    Raises:
        ValueError: the rows are not uint8 or do not have the bytes of `width` values.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_bytes(width):
        raise ValueError(
            f"rows of {packed.shape[-1]} {packed.dtype} do not hold {width} ternary values"
        )
    rows = _values(packed.device).index_select(0, packed.flatten().int())
    return rows.view(*packed.shape[:-1], -1)[..., :width]


@cache
def _values(device: torch.device) -> Tensor:
    """Return the five values of each byte, int8 [243, 5]."""
    places = torch.tensor([3**place for place in range(VALUES_PER_BYTE)])
    digits = torch.arange(BYTES_USED)[:, None] // places % 3
    return (digits - 1).to(torch.int8).to(device)
