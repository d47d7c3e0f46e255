"""How a CUDA kernel is launched for a shape: grid, shared memory, splits of K, scratch.

Pure arithmetic on sizes, so that it is checked without a card. The constants are starting points
from the limits in `docs/kernels.md`, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.fragments import ROWS, STEP, padded_shape

THREADS = 256
WARPS = THREADS // 32
DECODE_TOKENS = 8

BATCH_TOKENS = 64
"""Most tokens of batch.cu; prefill.cu has the rest."""

W8A8_TOKENS = 16
"""Most tokens of w8a8.cu; torch._int_mm, which takes no fewer than 17, has the rest."""

W8A8_STEP = 64
"""Inputs of a step of w8a8.cu."""

VENDOR_TOKENS = 1024
"""From so many tokens on, dequantizing and the vendor's GEMM are faster than prefill.cu."""

MOST_STAGES = 4

SHARED_BYTES = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227}
"""KiB of shared memory that a block may ask for (CUDA C++ Programming Guide, technical
specifications); a card that is not here is taken to have the least."""

FEATURES = 128
"""Rows of y that a block of batch.cu or prefill.cu makes."""

WAVES = 2
"""Blocks a multiprocessor should get: fewer leave it idle, more repeat the staging of x."""

MOST_PROCESSORS = 1024
"""More multiprocessors than any card has."""

DECODE_SHARED = 48 * 1024
"""What every card gives a block without being asked; two or more such blocks fit everywhere."""


def shared_limit(architecture: str) -> int:
    """Return the bytes of shared memory that a block may have on `sm_90` and the like."""
    return SHARED_BYTES.get(architecture, min(SHARED_BYTES.values())) * 1024


def most_counters(shape: tuple[int, int]) -> int:
    """Return the counters that any launch for `shape` (out, in) needs whose K is split.

    A decode block has at least 16 rows; tiles are split only where they are fewer than processors.
    """
    return max(padded_shape(*shape)[0] // ROWS, MOST_PROCESSORS)


@dataclass(frozen=True)
class Plan:
    """A launch: defines beyond those of the format, grid, bytes, and float32 numbers of scratch.

    `arrived` is the number of uint32 counters, which must be zero and are left so.
    """

    defines: dict[str, int]
    grid: tuple[int, ...]
    shared_bytes: int
    partial: int
    arrived: int


def decode_shared(m: int, columns: int, tiles: int, group_size: int, zeros: bool) -> int:
    """Return the shared memory of a decode block over `columns` inputs, in bytes.

    The same arithmetic as `shared_layout` in decode.cu.
    """
    chunks = columns // (group_size or STEP)
    floats = chunks * 8 * (2 if zeros else 1) + WARPS * ROWS * tiles * 8 + 3 * 8
    return m * (columns + 32) * 2 + floats * 4


def decode_plan(
    shape: tuple[int, int], m: int, group_size: int, zeros: bool, processors: int
) -> Plan:
    """Return the launch of decode.cu for `shape` (out, in), `m` tokens and a card's processors.

    Wide blocks repeat less of the staging of x, whose cost grows with m; so the more tokens, the
    wider, with K split until there are enough blocks and x fits.
    """
    rows, columns = padded_shape(*shape)
    steps = columns // STEP
    tiles = 1 if m <= 2 else 2 if m <= 4 else 4
    blocks = rows // (ROWS * tiles)
    splits = min(max(1, WAVES * processors // blocks), max(1, steps // WARPS))

    def shared(parts: int) -> int:
        return decode_shared(m, -(-steps // parts) * STEP, tiles, group_size, zeros)

    while splits < steps and shared(splits) > DECODE_SHARED:
        splits += 1
    return Plan(
        defines={"TILES": tiles},
        grid=(blocks, splits),
        shared_bytes=shared(splits),
        partial=splits * m * rows if splits > 1 else 0,
        arrived=blocks,
    )


def tile_shared(bits: int, group_size: int, zeros: bool, tokens: int, stages: int) -> int:
    """Return the shared memory of a block of batch.cu or prefill.cu, in bytes.

    The stages of the pipeline, or the tile of results and a word that reuse their place.
    """
    groups = STEP // group_size if group_size else 0
    row_tile = STEP * ROWS * bits // 8 + groups * (32 + (16 if zeros else 0))
    stage = tokens * STEP * 2 + FEATURES // ROWS * row_tile
    return max(stages * stage, tokens * (FEATURES + 4) * 4 + 16)


def tile_plan(
    shape: tuple[int, int], m: int, bits: int, group_size: int, zeros: bool, card: tuple[int, int]
) -> Plan:
    """Return the launch of batch.cu (up to 64 tokens) or prefill.cu (more) for `shape` (out, in).

    `card` is its processors and the bytes of shared memory a block may have. K is split, at four
    steps a part or more, until every processor has a block. The grid has a third axis, the splits.
    """
    rows, columns = padded_shape(*shape)
    steps, (processors, limit) = columns // STEP, card
    tiles = 8 if m > 32 else 4 if m > 16 else 2
    tokens = 8 * tiles if m <= BATCH_TOKENS else 2 * 8 * tiles
    blocks = -(-rows // FEATURES) * -(-m // tokens)
    splits = min(max(1, processors // blocks), max(1, steps // 4))
    stages = MOST_STAGES
    while stages > 2 and tile_shared(bits, group_size, zeros, tokens, stages) > limit:
        stages -= 1
    return Plan(
        defines={"TOKEN_TILES": tiles, "STAGES": stages},
        grid=(-(-rows // FEATURES), -(-m // tokens), splits),
        shared_bytes=tile_shared(bits, group_size, zeros, tokens, stages),
        partial=splits * m * rows if splits > 1 else 0,
        arrived=blocks,
    )


def w8a8_shared(m: int, columns: int) -> int:
    """Return the shared memory of a block of w8a8.cu over `columns` inputs, in bytes."""
    tokens = DECODE_TOKENS if m <= DECODE_TOKENS else W8A8_TOKENS
    stride = columns + W8A8_STEP - columns % (2 * W8A8_STEP)
    return m * stride + WARPS * ROWS * tokens * 4 + 16


def w8a8_plan(shape: tuple[int, int], m: int, processors: int) -> Plan:
    """Return the launch of w8a8.cu for `shape` (out, stored columns) and up to 16 tokens."""
    rows, columns = shape
    blocks, steps = -(-rows // ROWS), -(-columns // W8A8_STEP)
    splits = min(max(1, WAVES * processors // blocks), max(1, steps // WARPS))

    def shared(parts: int) -> int:
        return w8a8_shared(m, -(-steps // parts) * W8A8_STEP)

    while splits < steps and shared(splits) > DECODE_SHARED:
        splits += 1
    return Plan(
        defines={"TOKEN_TILES": 1 if m <= DECODE_TOKENS else 2},
        grid=(blocks, splits),
        shared_bytes=shared(splits),
        partial=splits * m * blocks * ROWS if splits > 1 else 0,
        arrived=blocks,
    )
