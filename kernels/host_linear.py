"""The call of `kernels/c`'s linear map: its structure, built of tensors in the layout of panels.

Threads are those torch is set to, from the pool torch's own operators use.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.host_build import library
from kernels.panels import UNIT_ROWS

ONE_BF16, TWO_BF16, INT8 = 1, 2, 8
"""How activations are read: see `kernels/c/linear.h`."""

SCALE_KINDS = {torch.bfloat16: 16, torch.float16: 17, torch.float32: 32}

LARGE_PAGE = 2 << 20
STRETCH = 32 << 20
"""Bytes that small matrices share. What nobody wrote to takes no memory, beyond its last page."""

ALIGNMENT = 64

_shared: list[Tensor] = []
"""What is left of the newest shared stretch."""


class Matrix(ctypes.Structure):
    """`qb_matrix` of linear.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


def activation_of(dtype: torch.dtype) -> int:
    """Return how activations of a type are read: 8 bits of their fraction, or 16."""
    return ONE_BF16 if dtype == torch.bfloat16 else TWO_BF16


def panel_matrix(
    columns: int,
    panels: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int, int, int],
    activation: int,
) -> Matrix:
    """Return the structure; whoever holds it keeps the tensors alive.

    `shape` is rows, filled-up width, inputs of a group (the width for one scale a row), bits;
    `bias` is float32.
    """
    rows, width, group, bits = shape
    return Matrix(
        kind=bits,
        activation=activation,
        rows=rows,
        columns=columns,
        width=width,
        group=group,
        scale_kind=SCALE_KINDS[scale.dtype],
        weight=panels.data_ptr(),
        scale=scale.data_ptr(),
        zero=None if zero_point is None else zero_point.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
    )


def multiply(matrix: Matrix, x: Tensor) -> Tensor:
    """Return float32 [tokens, rows] of x [tokens, columns], of any floating type."""
    functions = _functions()
    x = x.float().contiguous()
    tokens = x.shape[0]
    y = torch.empty(tokens, matrix.rows)
    prepared = torch.empty(functions.qb_prepared_bytes(matrix, tokens), dtype=torch.uint8)
    functions.qb_linear(
        matrix,
        x.data_ptr(),
        x.shape[1],
        tokens,
        prepared.data_ptr(),
        y.data_ptr(),
        matrix.rows,
        torch.get_num_threads(),
    )
    return y


def dequantize_rows(matrix: Matrix, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Return rows start .. end - 1 of a matrix in pairs as `dtype` [width, rows].

    `start` is a multiple of a unit; `dtype` is bfloat16 or float32.
    """
    functions = _functions()
    first, last = start // UNIT_ROWS, -(-end // UNIT_ROWS)
    to = torch.empty(matrix.width, (last - first) * UNIT_ROWS, dtype=dtype)
    kind = SCALE_KINDS[dtype]
    functions.qb_dequantize(matrix, first, last, kind, to.data_ptr(), torch.get_num_threads())
    return to[:, : end - start]


def in_large_pages(values: Tensor) -> Tensor:
    """Return a copy of uint8 [n] in large pages, where the system gives them.

    Weights are read from end to end at each token, and every page ends a prefetch. Small matrices
    share a stretch of memory, which is given back when the last of them is gone.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return values
    room = -(-values.numel() // ALIGNMENT) * ALIGNMENT
    if room > STRETCH // 2:
        place = _stretch(room)
    else:
        left = _shared[0] if _shared else torch.empty(0, dtype=torch.uint8)
        if left.numel() < room:
            left = _stretch(STRETCH)
        place = left[:room]
        _shared[:] = [left[room:]]
    return place[: values.numel()].copy_(values)


def _stretch(size: int) -> Tensor:
    """Return uint8 [size] of new memory that begins with a large page."""
    memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without them: nothing is lost
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE_PAGE
    return whole[start : start + size]


@cache
def _functions() -> Any:
    functions = library()
    pointer, number, long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    matrix = ctypes.POINTER(Matrix)
    for name, result, arguments in (
        ("qb_prepared_bytes", long, (matrix, number)),
        ("qb_linear", None, (matrix, pointer, long, number, pointer, pointer, long, number)),
        ("qb_dequantize", None, (matrix, number, number, number, pointer, number)),
    ):
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    return functions
