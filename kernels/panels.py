"""Weights in the order in which the C kernels read them, and back.

Rows come in blocks of 16, the lanes of a vector of 32-bit words, and blocks in units of 4 (the last
unit may have fewer): [unit][step of 32 inputs][block][bits words][16 rows]. A step holds 32 * bits
bits of a row, none of them unused. Which code is where:

- `PAIRS`, for bfloat16 activations. Each half of a word gives one input of a pair: pair p is the
  inputs 2p (low half) and 2p + 1. With 8, 4 and 2 bits, word w holds the next 16 / bits pairs,
  the first in its lowest bits. With 3 bits, words 0, 1 and 2 hold 5 pairs each, and the three bits
  of pair 15 are the highest of the halves of words 0, 1 and 2. A byte of 8 bits holds sign (highest
  bit) and magnitude of code - 127.5, the magnitude without its half.
- `QUADS`, for int8 activations. A word has 4 consecutive inputs, one a byte; quad q is the inputs
  4q .. 4q + 3. With 8, 4 and 2 bits, word w holds the next 8 / bits quads, the first in the lowest
  bits of each byte. With 3 bits, words 0 and 1 hold the low two bits that way, and bit q of the
  bytes of word 2 is the high bit of quad q.

Scales and zero points: [unit][group][row of the unit].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Order = Literal["pairs", "quads"]
PAIRS: Order = "pairs"
QUADS: Order = "quads"

LANES = 16
UNIT_BLOCKS = 4
UNIT_ROWS = LANES * UNIT_BLOCKS
STEP = 32
"""Inputs that are packed together; widths are filled up to a multiple of it."""

CHUNK_UNITS = 16
"""Units packed at once: the codes pass through 32-bit words."""


def pack_panels(codes: Tensor, bits: int, order: Order) -> Tensor:
    """Return uint8 [bytes] of uint8 codes [rows, width]; 32 has to divide the width.

    Rows are filled up to whole blocks with code 0.
    """
    chunks = []
    for start in range(0, codes.shape[0], CHUNK_UNITS * UNIT_ROWS):
        part = codes[start : start + CHUNK_UNITS * UNIT_ROWS]
        part = functional.pad(part, (0, 0, 0, -part.shape[0] % LANES))
        rows = part.reshape(-1, LANES, part.shape[1] // STEP, STEP).transpose(1, 2)
        words = _join_pairs(rows, bits) if order == PAIRS else _join_quads(rows, bits)
        chunks += [unit.transpose(0, 1).flatten() for unit in torch.split(words, UNIT_BLOCKS)]
    return torch.cat(chunks)


def unpack_panels(
    panels: Tensor, bits: int, order: Order, rows: int, width: int, start: int = 0
) -> Tensor:
    """Return the codes of `rows` rows from row `start` (a multiple of a unit): [rows, width]."""
    step_bytes = LANES * STEP * bits // 8
    blocks, steps = -(-rows // LANES), width // STEP
    first = start // LANES * steps * step_bytes
    flat = panels[first : first + blocks * steps * step_bytes]
    units = torch.split(flat, UNIT_BLOCKS * steps * step_bytes)
    joined = torch.cat([u.view(steps, -1, step_bytes).transpose(0, 1) for u in units])
    split = _split_pairs if order == PAIRS else _split_quads
    return split(joined, bits).transpose(1, 2).reshape(-1, width)[:rows]


def panel_shape(columns: int, group_size: int) -> tuple[int, int]:
    """Return the filled-up width of a row, and how many of its inputs share a scale."""
    unit = STEP if group_size == -1 else group_size
    width = -(-columns // unit) * unit
    return width, width if group_size == -1 else group_size


def pack_grid(values: Tensor) -> Tensor:
    """Return scales or zero points [rows, groups] as [unit][group][row], flat."""
    values = functional.pad(values, (0, 0, 0, -values.shape[0] % LANES))
    return torch.cat([unit.T.flatten() for unit in torch.split(values, UNIT_ROWS)])


def unpack_grid(flat: Tensor, rows: int, groups: int) -> Tensor:
    """Return [rows, groups] of what `pack_grid` gave."""
    units = torch.split(flat, UNIT_ROWS * groups)
    return torch.cat([unit.view(groups, -1).T for unit in units])[:rows]


# Below, codes are uint8 [blocks, steps, 16 rows, 32 inputs], words uint8 [blocks, steps, bytes].


def _shifted(codes: Tensor, bits: int) -> Tensor:
    """Return int32 [...] of codes [..., n] side by side, the first in the lowest bits."""
    word = torch.zeros(codes.shape[:-1], dtype=torch.int32)
    for place in range(codes.shape[-1]):
        word |= codes[..., place].int() << bits * place
    return word


def _spread(words: Tensor, bits: int, count: int) -> Tensor:
    """Return uint8 [..., count] of the codes that int32 words [...] hold side by side."""
    places = [(words >> bits * place) & ((1 << bits) - 1) for place in range(count)]
    return torch.stack(places, dim=-1).to(torch.uint8)


def _sign_and_magnitude(codes: Tensor) -> Tensor:
    return torch.where(codes < 128, 255 - codes, codes - 128)


def _whole(signed: Tensor) -> Tensor:
    return torch.where(signed >= 128, 255 - signed, signed + 128)


def _join_pairs(codes: Tensor, bits: int) -> Tensor:
    codes = _sign_and_magnitude(codes) if bits == 8 else codes
    pairs = codes.reshape(*codes.shape[:-1], STEP // 2, 2)  # [..., 16 rows, 16 pairs, 2]
    in_word = 16 // bits
    halves = pairs[..., : bits * in_word, :].reshape(*codes.shape[:-1], bits, in_word, 2)
    halves = halves.transpose(-1, -2)
    words = _shifted(halves, bits)  # [..., 16 rows, words, 2]
    if bits == 3:
        last = pairs[..., 15, :].int()
        words |= torch.stack([last >> place & 1 for place in range(3)], dim=-2) << 15
    return words.to(torch.int16).transpose(2, 3).contiguous().view(torch.uint8).flatten(2)


def _split_pairs(packed: Tensor, bits: int) -> Tensor:
    blocks, steps = packed.shape[:2]
    halves = packed.contiguous().view(torch.int16).int().view(blocks, steps, bits, LANES, 2)
    halves = halves.transpose(2, 3)  # [..., 16 rows, words, 2]
    pairs = _spread(halves, bits, 16 // bits).transpose(-1, -2).flatten(3, 4)
    if bits == 3:
        last = _shifted(halves.transpose(-1, -2) >> 15 & 1, 1).to(torch.uint8)
        pairs = torch.cat([pairs, last.unsqueeze(-2)], dim=-2)
    codes = pairs.flatten(-2)
    return _whole(codes) if bits == 8 else codes


def _join_quads(codes: Tensor, bits: int) -> Tensor:
    quads = codes.reshape(*codes.shape[:-1], STEP // 4, 4)  # [..., 16 rows, 8 quads, 4]
    if bits == 3:
        words = torch.cat([_planes(quads & 3, 2), _planes(quads >> 2, 1)], dim=-2)
    else:
        words = _planes(quads, bits)
    return words.transpose(2, 3).flatten(2)


def _planes(quads: Tensor, bits: int) -> Tensor:
    """Return uint8 [..., bits words, 4 bytes] of codes [..., 8 quads, 4]."""
    apart = quads.reshape(*quads.shape[:-2], bits, 8 // bits, 4).transpose(-1, -2)
    return _shifted(apart, bits).to(torch.uint8)


def _split_quads(packed: Tensor, bits: int) -> Tensor:
    words = packed.reshape(*packed.shape[:2], bits, LANES, 4).transpose(2, 3)
    if bits == 3:
        quads = _quads(words[..., :2, :], 2) | _quads(words[..., 2:, :], 1) << 2
    else:
        quads = _quads(words, bits)
    return quads.flatten(-2)


def _quads(words: Tensor, bits: int) -> Tensor:
    """Return uint8 [..., 8 quads, 4] of words [..., bits, 4]."""
    return _spread(words.int(), bits, 8 // bits).transpose(-1, -2).flatten(-3, -2)
