"""The CUDA side of the ops in `kernels.device_ops`: which kernel, which launch, which scratch.

Kernels are compiled and loaded at the first call that needs them (`kernels.build`). The regimes of
a packed linear map, by its number of tokens, are those of `docs/kernels.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels import plans
from kernels.build import Argument, Kernel, architecture, kernel
from kernels.device_reference import grouping, stored_format
from kernels.errors import ConfigError
from kernels.fragments import ROWS, STEP, padded_shape
from kernels.pack import packed_bytes, padded_width
from kernels.variants import format_defines

DTYPE = {torch.float16: 0, torch.bfloat16: 1}
SOURCE = {**DTYPE, torch.float32: 2}
ALIGNMENT = 16
"""Bytes of the widest load."""

Defines = tuple[tuple[str, int], ...]
Matrix = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]
"""Words, scales, zero points, row scales and bias, as every kernel of a packed map takes them."""


@dataclass(frozen=True)
class Card:
    """What a plan needs to know of a card: torch's index, multiprocessors, bytes of a block."""

    index: int
    processors: int
    shared_bytes: int


@dataclass(frozen=True)
class Format:
    """How a matrix is stored, [out_features, in_features] being its true size."""

    bits: int
    group_size: int
    zeros: bool
    out_features: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """True rows and columns."""
        return self.out_features, self.in_features

    def defines(self, dtype: int, **tiles: int) -> Defines:
        """Return the defines of a kernel for this format."""
        own = format_defines(self.bits, self.group_size, self.zeros)
        return tuple({**own, "DTYPE": dtype, **tiles}.items())


@cache
def card(index: int) -> Card:
    """Return the facts of a card."""
    facts = torch.cuda.get_device_properties(index)
    limit = plans.shared_limit(architecture((facts.major, facts.minor)))
    return Card(index, facts.multi_processor_count, limit)


@cache
def loaded(index: int, file: str, function: str, defines: Defines) -> Kernel:
    """Return a kernel for the card `index`, which is torch's current one."""
    return kernel(file, function, dict(defines))


@lru_cache(maxsize=4096)
def linear_plan(packed: Format, m: int, on: Card) -> tuple[str, plans.Plan]:
    """Return the regime and the launch for `m` tokens; see `kernels.plans`."""
    group_size, zeros = packed.group_size, packed.zeros
    if m <= plans.DECODE_TOKENS:
        plan = plans.decode_plan(packed.shape, m, group_size, zeros, on.processors)
        return "decode", plan
    limits = (on.processors, on.shared_bytes)
    plan = plans.tile_plan(packed.shape, m, packed.bits, group_size, zeros, limits)
    return "batch" if m <= plans.BATCH_TOKENS else "prefill", plan


def linear_kernel(packed: Format, m: int, dtype: torch.dtype) -> Kernel:
    """Return the kernel for `m` tokens on the current card."""
    index = torch.cuda.current_device()
    regime, plan = linear_plan(packed, m, card(index))
    return loaded(index, f"{regime}.cu", regime, packed.defines(DTYPE[dtype], **plan.defines))


def fragment_linear(
    x: Tensor,
    words: Tensor,
    row_scale: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
) -> Tensor:
    """Multiply by packed weights on a card; see `kernels.device_ops.fragment_linear`.

    Raises:
        ConfigError: the card has no kernel for activations of this type.
        ValueError: the tensors do not fit each other.
    """
    out, columns = row_scale.shape[0], x.shape[-1]
    _check_activations(x, bias, out)
    bits, group_size = stored_format(words, scale, columns)
    packed = Format(bits, group_size, zero_point is not None, out, columns)
    if words.shape[0] * ROWS != padded_shape(out, columns)[0]:
        raise ValueError(f"words {tuple(words.shape)} do not hold {out} rows")
    matrix = (words, scale, zero_point, row_scale, bias)
    rows = _aligned(x.reshape(-1, columns))
    y = x.new_empty((rows.shape[0], out))
    with torch.cuda.device(x.device):
        if rows.shape[0] >= plans.VENDOR_TOKENS:
            y = functional.linear(rows, dequantized(packed, matrix, x.dtype), bias)
        elif rows.shape[0]:
            _multiply(packed, matrix, rows, y, counters)
    return y.reshape(*x.shape[:-1], out)


def _multiply(packed: Format, matrix: Matrix, x: Tensor, y: Tensor, counters: Tensor) -> None:
    """Launch the kernel for x [tokens, in], with prepare.cu before it where that is needed."""
    on, m = card(x.device.index), x.shape[0]
    regime, plan = linear_plan(packed, m, on)
    found = linear_kernel(packed, m, x.dtype)
    if plan.partial and counters.numel() < plan.arrived:
        raise ValueError(f"{counters.numel()} counters where {plan.arrived} are needed")
    padded_rows, padded_columns = padded_shape(*packed.shape)
    partial = x.new_empty(plan.partial, dtype=torch.float32)
    outputs = (y, partial, counters)
    if regime == "decode":
        sizes = (m, packed.out_features, packed.in_features, padded_columns)
        _launch(found, plan.grid, plan.shared_bytes, x, *matrix, *outputs, *sizes)
        return
    unscale, width = None, packed.in_features
    if x.dtype == torch.bfloat16 or width % 8:
        x, unscale = _prepared(on, x, padded_columns)
        width = padded_columns
    numbers = (m, packed.out_features, padded_rows, width, width, padded_columns)
    _launch(found, plan.grid, plan.shared_bytes, x, unscale, *matrix, *outputs, *numbers)


def _prepared(on: Card, x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return x as float16 [tokens, columns] and what gives each token its size back."""
    filled = x.new_empty((x.shape[0], columns), dtype=torch.float16)
    unscale = x.new_empty(x.shape[0], dtype=torch.float32)
    found = loaded(on.index, "prepare.cu", "prepare", (("DTYPE", DTYPE[x.dtype]),))
    _launch(found, (x.shape[0],), ALIGNMENT, x, filled, unscale, x.shape[1], columns)
    return filled, unscale


def dequantized(packed: Format, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Return the weights [out, in] that packed ones stand for, on the current card."""
    words, scale, zero_point, row_scale, _ = matrix
    weight = words.new_empty(packed.shape, dtype=dtype)
    columns = padded_shape(*packed.shape)[1]
    grid = (words.shape[0], -(-columns // (STEP * plans.WARPS)))
    found = loaded(words.device.index, "dequantize.cu", "dequantize", packed.defines(DTYPE[dtype]))
    stored = (words, scale, zero_point, row_scale)
    _launch(found, grid, 0, *stored, weight, *packed.shape, columns)
    return weight


def w8a8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply int8 by int8 on a card; see `kernels.device_ops.w8a8_linear`.

    Raises:
        ConfigError: the card has no kernel for activations of this type.
        ValueError: the tensors do not fit each other.
    """
    out, columns, (rows, pitch) = scale.shape[0], x.shape[-1], weight.shape
    _check_activations(x, bias, out)
    if rows < out or rows % 8 or pitch < columns or pitch % ALIGNMENT:
        raise ValueError(f"int8 weights {rows} x {pitch} for {out} x {columns}")
    flat = _aligned(x.reshape(-1, columns))
    y = x.new_empty((flat.shape[0], out))
    with torch.cuda.device(x.device):
        if flat.shape[0]:
            _multiply_bytes(flat, weight, scale, bias, y)
    return y.reshape(*x.shape[:-1], out)


def _multiply_bytes(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Round x [tokens, in], multiply by w8a8.cu or torch._int_mm, and scale into y."""
    on, (m, columns), pitch = card(x.device.index), x.shape, weight.shape[1]
    plan = plans.w8a8_plan((y.shape[1], pitch), min(m, plans.W8A8_TOKENS), on.processors)
    defines = tuple({"DTYPE": DTYPE[x.dtype], **plan.defines}.items())
    codes = x.new_empty((m, pitch), dtype=torch.int8)
    steps = x.new_empty(m, dtype=torch.float32)
    quantizer = loaded(on.index, "w8a8.cu", "quantize_tokens", defines)
    arrived = plan.arrived if m <= plans.W8A8_TOKENS else 0
    counters = x.new_empty(arrived, dtype=torch.int32)
    _launch(quantizer, (m,), ALIGNMENT, x, codes, steps, counters, columns, pitch, arrived)
    if m <= plans.W8A8_TOKENS:
        partial = x.new_empty(plan.partial, dtype=torch.int32)
        found = loaded(on.index, "w8a8.cu", "w8a8", defines)
        tensors = (codes, steps, weight, scale, bias, y, partial, counters)
        _launch(found, plan.grid, plan.shared_bytes, *tensors, m, y.shape[1], pitch)
        return
    sums = torch._int_mm(codes, weight.t())
    found = loaded(on.index, "w8a8.cu", "rescale", defines)
    grid = (m, -(-y.shape[1] // plans.THREADS))
    _launch(found, grid, 0, sums, steps, scale, bias, y, y.shape[1], sums.shape[1])


def quantize_pack(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Round and pack a matrix on a card; see `kernels.device_ops.quantize_pack`.

    Raises:
        ConfigError: there is no such format.
        ValueError: the weights have another type.
    """
    out, columns = weight.shape
    groups, size = grouping(columns, bits, group_size)
    if weight.dtype not in SOURCE:
        raise ValueError(f"weights of {weight.dtype} are not quantized on a card")
    weight = weight.contiguous()
    row_bytes = packed_bytes(groups * size, bits)
    packed = weight.new_empty((out, row_bytes), dtype=torch.uint8)
    scale = weight.new_empty((out, groups), dtype=torch.float16)
    zero_point = weight.new_empty((0 if symmetric else out, groups), dtype=torch.uint8)
    if not out:
        return packed, scale, zero_point
    defines = (("BITS", bits), ("SYMMETRIC", int(symmetric)), ("SOURCE", SOURCE[weight.dtype]))
    with torch.cuda.device(weight.device):
        found = loaded(weight.device.index, "quantize.cu", "quantize", defines)
        sizes = (out, columns, size, groups, row_bytes)
        grid = (-(-out * groups // plans.WARPS),)
        _launch(found, grid, 0, weight, packed, scale, zero_point, *sizes)
    return packed, scale, zero_point


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Unpack codes on a card; see `kernels.device_ops.unpack`.

    Raises:
        ValueError: the rows hold fewer codes.
    """
    row_bytes = packed.shape[-1]
    stored = row_bytes * 8 // bits
    if packed.dtype != torch.uint8 or padded_width(stored, bits) != stored or width > stored:
        raise ValueError(
            f"packed rows of {row_bytes} {packed.dtype} hold no {width} codes of {bits} bits"
        )
    packed = packed.contiguous()
    codes = packed.new_empty((*packed.shape[:-1], width))
    if not codes.numel():
        return codes
    rows = codes.numel() // width
    with torch.cuda.device(packed.device):
        found = loaded(packed.device.index, "unpack.cu", "unpack", (("BITS", bits),))
        grid = (-(-rows * -(-width // 8) // plans.THREADS),)
        _launch(found, grid, 0, packed, codes, rows, row_bytes, width)
    return codes


def _launch(found: Kernel, grid: tuple[int, ...], shared: int, *arguments: Argument) -> None:
    """Launch on the current stream, blocks of 256 threads."""
    x, y, z = (*grid, 1, 1)[:3]
    found.launch((x, y, z), (plans.THREADS, 1, 1), shared, *arguments)


def _aligned(x: Tensor) -> Tensor:
    """Return x such that every row can be read by the widest load that its width allows."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _check_activations(x: Tensor, bias: Tensor | None, out: int) -> None:
    if x.dtype not in DTYPE:
        raise ConfigError(
            f"no CUDA kernel for activations of {x.dtype}; there are some for float16 and bfloat16"
        )
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (out,)):
        raise ValueError(f"a bias of {bias.dtype} {tuple(bias.shape)} for {out} of {x.dtype}")
