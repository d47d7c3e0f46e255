"""Packed weights for tensor cores: the order in which the CUDA kernels read them.

The weights are the A operand of `mma.m16n8k16` (PTX ISA, "Matrix Fragments for mma.m16n8k16"): rows
are output features, columns are inputs, the activations are B. A lane is 4 * g + t, with g below 8
and t below 4; it holds rows g and g + 8 of a tile of 16. Which input stands in which column of A is
free as long as B agrees, so lane t takes the 8 consecutive inputs 8t .. 8t + 7 of each unit of 32:
its share of x is one 16-byte load, and a unit is two fragments. Input k = 32u + 8t + 2p + h of a
k-tile is in unit u, pair p (register r = p % 2 of fragment f = p // 2) and half h; row 8i + g is in
half-tile i.

A k-tile is what one 16-byte load per lane holds; words are 32 bits, little-endian:

| bits | inputs | word          | bits of the word, from                                | s      |
|------|--------|---------------|-------------------------------------------------------|--------|
| 8    | 32     | 2i + f        | 8 (2r + h)                                            | 0      |
| 4    | 64     | 2u + i        | 16h + 4p                                              | 4p     |
| 2    | 128    | 2 (u / 2) + i | 16h + 2j, where j = 4 (u % 2) + p                     | 2j     |
| 3    | 128    | 2 (u / 2) + i | as 2 bits: the low two                                | 2p     |
|      |        | 4 + i         | the high one: (16h + 2p + 2 + u % 2 + 8 (u / 2)) % 32 | 2p + 2 |

s is the bit of an fp16 mantissa where the code then stands, less 6 (4 bits, p above 1; 2 bits, j
above 4), for which the word is shifted by 6; for 3 bits and odd u it is shifted by 8, and the high
bits are rotated. Read as a number, that is 2**(10 - s) + q (3 bits: s of the low ones).
So a mask and an OR with the bits of 2**(10 - s) make two fp16 numbers at once (the trick of
Kim et al. 2022, "Who Says Elephants Can't Run", arXiv 2211.10017). The kernels take the offset off
once per group (decode) or per pair; here it needs no shift of q and no scaled x, because s moves
the exponent instead.

Memory order: words [n_tile, k_tile, lane, 16 bytes] (3 bits: then [lane, 8 bytes] of high bits);
scales, and zero points as bytes, [n_tile, step, g, group of the step, i], a step being 128 inputs,
so that one load gives a lane all scales of a step. Scales of groups are fp16 after division by a
power of two per row, which `row_scale` (float32) gives back; per channel `row_scale` is all. N is
filled up to 64 and K to 128 with zero codes and zero scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels.errors import ConfigError

LAYOUT_VERSION = 1

ROWS = 16
"""Rows of a tile."""

ROW_MULTIPLE = 64
STEP = 128
"""Inputs whose scales are loaded at once; K is filled up to a multiple of it."""

UNIT = 32
UNITS = {8: 1, 4: 2, 3: 4, 2: 4}
"""Bits -> units of 32 inputs in a k-tile."""

GROUPS = (32, 64, 128)

BLOCK_TILES = 32
"""Row tiles packed at once: bounds the int32 intermediate."""


@dataclass(frozen=True)
class Fragments:
    """A matrix in the CUDA layout.

    Attributes:
        words: int32 [n_tiles, k_tiles, words of a tile].
        row_scale: float32 [padded out_features].
        scale: float16 [n_tiles, steps, 8, groups of a step, 2]; None per channel.
        zero_point: uint8, shaped as `scale` ([n_tiles, 1, 8, 1, 2] per channel); None: symmetric.
        group_size: 32, 64 or 128; 0 is per channel.
        out_features, in_features: true sizes.
    """

    words: Tensor
    row_scale: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    bits: int
    group_size: int
    out_features: int
    in_features: int
    version: int = LAYOUT_VERSION

    @property
    def padded(self) -> tuple[int, int]:
        """Stored rows and columns."""
        return padded_shape(self.out_features, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes that one multiplication reads of this matrix."""
        stored = (self.words, self.row_scale, self.scale, self.zero_point)
        return sum(t.numel() * t.element_size() for t in stored if t is not None)


@dataclass(frozen=True)
class Slots:
    """Where the codes of a lane's k-tile stand: index [words, codes of a word] and shift, alike.

    A lane's codes are numbered ((u * 2 + i) * 4 + p) * 2 + h. `low` and `high` are how far the code
    is shifted before it is placed, and the bits that are placed there.
    """

    index: Tensor
    shift: Tensor
    drop: int
    mask: int


def padded_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Return the stored rows and columns of a matrix of `out_features` x `in_features`."""
    rows = -(-out_features // ROW_MULTIPLE) * ROW_MULTIPLE
    return rows, -(-in_features // STEP) * STEP


def tile_inputs(bits: int) -> int:
    """Return the inputs of a k-tile.

    Raises:
        ConfigError: `bits` has no layout.
    """
    if bits not in UNITS:
        raise ConfigError(f"no CUDA layout for {bits} bits; there is one for 8, 4, 3 and 2")
    return UNIT * UNITS[bits]


def code_offset(bits: int) -> list[int]:
    """Return what the extracted code of each input of a k-tile has added to it: [tile_inputs]."""
    offsets = []
    for k in range(tile_inputs(bits)):
        u, p = k // UNIT, k % 8 // 2
        slot = 4 * (u % 2) + p
        by_bits = {
            8: 0,
            4: (0, 4, 2, 6)[p],
            3: 2 * p,
            2: 2 * slot if slot < 5 else 2 * slot - 6,
        }
        offsets.append(2 ** (10 - by_bits[bits]))
    return offsets


@cache
def slots(bits: int) -> tuple[Slots, ...]:
    """Return the planes of a k-tile's words, in order: one, or two for 3 bits."""
    places: list[tuple[int, int, int]] = []
    high: list[tuple[int, int, int]] = []
    for code in range(UNITS[bits] * 16):
        u, i, p, h = code // 16, code // 8 % 2, code // 2 % 4, code % 2
        if bits == 8:
            places.append((2 * i + p // 2, 8 * (2 * (p % 2) + h), code))
        elif bits == 4:
            places.append((2 * u + i, 16 * h + 4 * p, code))
        else:
            places.append((2 * (u // 2) + i, 16 * h + 2 * (4 * (u % 2) + p), code))
            high.append((i, (16 * h + 2 * p + 2 + u % 2 + 8 * (u // 2)) % 32, code))
    plane = _slots(places, 0, 2**bits - 1 if bits != 3 else 3)
    return (plane, _slots(high, 2, 1)) if bits == 3 else (plane,)


def _slots(places: list[tuple[int, int, int]], drop: int, mask: int) -> Slots:
    """Sort (word, shift, code) into one row a word."""
    count = max(word for word, _, _ in places) + 1
    ordered = sorted(places)
    shape = (count, len(places) // count)
    index = torch.tensor([code for _, _, code in ordered]).reshape(shape)
    shift = torch.tensor([shift for _, shift, _ in ordered], dtype=torch.int32).reshape(shape)
    return Slots(index, shift, drop, mask)


def pack_fragments(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int | None = None,
) -> Fragments:
    """Put a matrix scale * (code - zero_point) into the CUDA layout.

    Args:
        codes: uint8 [out, stored columns].
        scale: floating [out, groups], or [1, 1] for one scale a matrix.
        zero_point: uint8, shaped as `scale`, or None: 2**(bits - 1).
        bits: of a code: 8, 4, 3 or 2.
        group_size: inputs of a group: 32, 64 or a multiple of 128; -1 is the whole row.
        in_features: how many of the stored columns count; all by default.

    Scales per channel are kept exactly; scales of groups exactly if they have at most 11
    significant bits (float16, bfloat16) and none is smaller than 2**-14 of its row's largest, else
    rounded to that.

    Raises:
        ConfigError: bits or group size have no layout, or a scale is not finite.
        ValueError: codes, scales and zero points do not fit each other.
    """
    tile_inputs(bits)
    width = codes.shape[1] if in_features is None else in_features
    if group_size not in (-1, *GROUPS) and (group_size <= 0 or group_size % STEP):
        raise ConfigError(
            f"no CUDA kernel for groups of {group_size} inputs; "
            f"there are some for 32, 64, multiples of 128 and whole rows (-1)"
        )
    groups = 1 if group_size == -1 else -(-width // group_size)
    _check(codes, scale, zero_point, bits, groups, width)
    out = codes.shape[0]
    rows, columns = padded_shape(out, width)
    codes = functional.pad(codes[:, :width], (0, columns - width, 0, rows - out))
    scale = functional.pad(scale.float().expand(out, -1), (0, 0, 0, rows - out))
    if zero_point is not None:
        zero_point = functional.pad(zero_point.expand(out, -1), (0, 0, 0, rows - out))
    if group_size == -1:
        row_scale, stored = scale.squeeze(-1).contiguous(), None
        zeros = None if zero_point is None else _order_groups(zero_point, 1)
        group = 0
    else:
        group = min(group_size, STEP)
        row_scale = _power_of_two(scale.abs().amax(-1))
        stored = (scale / row_scale.unsqueeze(-1)).half()
        stored = _order_groups(_spread(stored, group_size, columns), STEP // group)
        zeros = None
        if zero_point is not None:
            zeros = _order_groups(_spread(zero_point, group_size, columns), STEP // group)
    return Fragments(_pack_words(codes, bits), row_scale, stored, zeros, bits, group, out, width)


def _check(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, groups: int, width: int
) -> None:
    if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] < width or width < 1:
        raise ValueError(f"codes must be uint8 [out, {width} or more], not {tuple(codes.shape)}")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit {bits} bits")
    if tuple(scale.shape) not in {(codes.shape[0], groups), (1, groups)}:
        raise ValueError(
            f"scales {tuple(scale.shape)} for {codes.shape[0]} rows of {groups} groups"
        )
    if zero_point is not None and (
        zero_point.shape != scale.shape or zero_point.dtype != torch.uint8
    ):
        raise ValueError(f"zero points must be uint8 {tuple(scale.shape)}")
    if not bool(torch.isfinite(scale).all()):
        raise ConfigError("a scale is not finite: quantize the matrix again")


def _power_of_two(values: Tensor) -> Tensor:
    """Return the largest power of two that is at most each value; 1 for 0."""
    _, exponent = torch.frexp(values)
    return torch.where(values > 0, torch.ldexp(torch.ones_like(values), exponent - 1), 1.0)


def _spread(values: Tensor, group_size: int, columns: int) -> Tensor:
    """Repeat [rows, groups] so that no group is wider than a step, and fill up to `columns`."""
    values = values.repeat_interleave(max(1, group_size // STEP), dim=1)
    count = columns // min(group_size, STEP)
    return functional.pad(values[:, :count], (0, count - min(count, values.shape[1])))


def _order_groups(values: Tensor, per_step: int) -> Tensor:
    """Order [rows, groups] as [n_tile, step, g, group of the step, i]."""
    tiled = values.reshape(-1, 2, 8, values.shape[1] // per_step, per_step)
    return tiled.permute(0, 3, 2, 4, 1).contiguous()


def _natural_groups(values: Tensor) -> Tensor:
    """Undo `_order_groups`: [padded rows, groups]."""
    return values.permute(0, 4, 2, 1, 3).reshape(values.shape[0] * ROWS, -1)


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack padded codes into int32 [n_tiles, k_tiles, words of a tile]."""
    units = UNITS[bits]
    blocks = []
    for block in torch.split(codes, ROWS * BLOCK_TILES):
        # [n_tile, i, g, k_tile, u, t, p, h] -> [n_tile, k_tile, lane, codes of the lane]
        split = block.reshape(-1, 2, 8, codes.shape[1] // (UNIT * units), units, 4, 4, 2)
        lanes = split.permute(0, 3, 2, 5, 4, 1, 6, 7).flatten(4).int()
        planes = []
        for plane in slots(bits):
            shift = plane.shift.to(codes.device)
            placed = ((lanes[..., plane.index] >> plane.drop) & plane.mask) << shift
            planes.append(placed.sum(-1, dtype=torch.int32).flatten(2))
        blocks.append(torch.cat(planes, dim=-1))
    return torch.cat(blocks)


def _unpack_words(words: Tensor, bits: int) -> Tensor:
    """Undo `_pack_words`: uint8 [padded rows, padded columns]."""
    n_tiles, k_tiles, _ = words.shape
    lanes = torch.zeros((n_tiles, k_tiles, 8, 4, UNITS[bits] * 16), dtype=torch.int32)
    start = 0
    for plane in slots(bits):
        count = plane.index.shape[0]
        part = words[..., start : start + 32 * count].reshape(n_tiles, k_tiles, 8, 4, count, 1)
        found = ((part >> plane.shift) & plane.mask) << plane.drop
        lanes[..., plane.index.flatten()] |= found.flatten(4)
        start += 32 * count
    split = lanes.to(torch.uint8).reshape(n_tiles, k_tiles, 8, 4, UNITS[bits], 2, 4, 2)
    return split.permute(0, 5, 2, 1, 4, 3, 6, 7).reshape(n_tiles * ROWS, -1)


def unpack_fragments(packed: Fragments) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes uint8 [out, in], scale float32 [out, groups] and zero points uint8, alike.

    The exact inverse of `pack_fragments` but for groups of more than 128 inputs, which come back as
    groups of 128, and for scales that had to be rounded.

    Raises:
        ConfigError: the layout is of another version.
    """
    if packed.version != LAYOUT_VERSION:
        raise ConfigError(
            f"CUDA layout version {packed.version}; this version reads {LAYOUT_VERSION}: pack again"
        )
    out, width = packed.out_features, packed.in_features
    codes = _unpack_words(packed.words.cpu(), packed.bits)[:out, :width].contiguous()
    groups = 1 if packed.group_size == 0 else math.ceil(width / packed.group_size)
    scale = packed.row_scale.cpu()[:out].unsqueeze(-1)
    if packed.scale is not None:
        scale = _natural_groups(packed.scale.cpu())[:out, :groups].float() * scale
    zero_point = packed.zero_point
    if zero_point is not None:
        zero_point = _natural_groups(zero_point.cpu())[:out, :groups].contiguous()
    return codes, scale, zero_point
