"""Packed storage of 8, 4, 3 and 2 bit codes along the input axis.

Layout version 1, one row of `width` codes after another, the first code in the lowest bits:

- 8 bits: one code a byte;
- 4 bits: two codes a byte, code 0 in the low nibble;
- 2 bits: four codes a byte;
- 3 bits: a plane of the low two bits (as 2 bits), then one of the high bit (eight codes a byte).

A width that does not fill its last byte (of both planes, for 3 bits) is padded with zero codes; the
reader gives the width it wants back. Codes are unsigned; a signed code is stored with
2**(bits - 1) added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LAYOUT_VERSION = 1

CODES_PER_UNIT = {8: 1, 4: 2, 3: 8, 2: 4}
"""Bits of a code -> the least number of codes that fill whole bytes."""


def padded_width(width: int, bits: int) -> int:
    """Return `width` raised to a whole number of bytes of `bits`-bit codes.

    Raises:
        ValueError: `bits` has no layout.
    """
    if bits not in CODES_PER_UNIT:
        raise ValueError(f"no packed layout for {bits} bits; there is one for 8, 4, 3 and 2")
    unit = CODES_PER_UNIT[bits]
    return -(-width // unit) * unit


def packed_bytes(width: int, bits: int) -> int:
    """Return the bytes that a row of `width` codes takes."""
    return padded_width(width, bits) * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., width] below 2**bits into uint8 [..., packed_bytes(width, bits)].

    Raises:
        ValueError: the codes are not uint8, or one of them needs more bits.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, not {codes.dtype}")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit {bits} bits")
    width = codes.shape[-1]
    codes = functional.pad(codes, (0, padded_width(width, bits) - width)).contiguous()
    if bits == 8:
        return codes
    if bits == 4:
        return _join_nibbles(codes)
    if bits == 2:
        return _join_pairs(codes)
    return torch.cat([_join_pairs(codes & 3), _join_bits(codes >> 2)], dim=-1)


def unpack(packed: Tensor, bits: int, width: int | None = None) -> Tensor:
    """Return the first `width` codes of each row (all stored ones by default), uint8 [..., width].

    Raises:
        ValueError: the rows hold fewer codes than `width`.
    """
    stored = packed.shape[-1] * 8 // bits
    width = stored if width is None else width
    if packed.dtype != torch.uint8 or padded_width(stored, bits) != stored or width > stored:
        raise ValueError(
            f"packed rows of {packed.shape[-1]} {packed.dtype} hold no {width} codes of {bits} bits"
        )
    if bits == 8:
        codes = packed
    elif bits == 4:
        codes = _split_nibbles(packed)
    elif bits == 2:
        codes = _split_pairs(packed)
    else:
        low, high = packed[..., : stored // 4], packed[..., stored // 4 :]
        codes = _split_pairs(low) | (_split_bits(high) << 2)
    return codes[..., :width]


# The helpers below spread the bits of one byte over the bytes of one wider integer, and gather them
# again: whole-vector passes, several times faster than writing every second (fourth, eighth) byte.
# Bytes of the wider integer are taken in memory order, which is little-endian wherever torch runs.


def _split_nibbles(packed: Tensor) -> Tensor:
    wide = packed.to(torch.int16)
    return ((wide | (wide << 4)) & 0x0F0F).view(torch.uint8)


def _join_nibbles(codes: Tensor) -> Tensor:
    wide = codes.view(torch.int16)
    return ((wide | (wide >> 4)) & 0xFF).to(torch.uint8)


def _split_pairs(packed: Tensor) -> Tensor:
    wide = packed.to(torch.int32)
    wide = (wide | (wide << 12)) & 0x000F000F
    return ((wide | (wide << 6)) & 0x03030303).view(torch.uint8)


def _join_pairs(codes: Tensor) -> Tensor:
    wide = codes.view(torch.int32)
    wide = (wide | (wide >> 6)) & 0x000F000F
    return ((wide | (wide >> 12)) & 0xFF).to(torch.uint8)


def _split_bits(packed: Tensor) -> Tensor:
    wide = packed.to(torch.int64)
    wide = (wide | (wide << 28)) & 0x0000000F0000000F
    wide = (wide | (wide << 14)) & 0x0003000300030003
    return ((wide | (wide << 7)) & 0x0101010101010101).view(torch.uint8)


def _join_bits(codes: Tensor) -> Tensor:
    wide = codes.view(torch.int64)
    wide = (wide | (wide >> 7)) & 0x0003000300030003
    wide = (wide | (wide >> 14)) & 0x0000000F0000000F
    return ((wide | (wide >> 28)) & 0xFF).to(torch.uint8)
