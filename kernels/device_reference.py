"""The plain PyTorch truth of the ops in `kernels.device_ops`: slow, short, for any device.

Conventions as in `kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.errors import ConfigError
from kernels.fragments import ROWS, STEP, UNITS, Fragments, tile_inputs, unpack_fragments
from kernels.pack import CODES_PER_UNIT, pack
from kernels.reference import dequantize

CODE = 127
"""Largest int8 code of an activation; -128 is not used, so that the grid is symmetric."""

HALF = torch.finfo(torch.float16)


def op_words(packed: Fragments) -> Tensor:
    """Return `Fragments.words` as the ops take them: [n_tiles, k_tiles, units, 16 * bits].

    The same memory; the shape says bits and width.
    """
    return packed.words.reshape(*packed.words.shape[:2], UNITS[packed.bits], -1)


def stored_format(words: Tensor, scale: Tensor | None, columns: int) -> tuple[int, int]:
    """Return bits and group size (0: per channel) of `op_words` with rows of `columns` weights.

    Raises:
        ValueError: they hold rows of another width.
    """
    bits = words.shape[3] // ROWS
    steps = -(-columns // STEP)
    expected = (steps * (STEP // tile_inputs(bits)), UNITS[bits], ROWS * bits)
    if words.shape[1:] != expected or (scale is not None and scale.shape[1] != steps):
        raise ValueError(f"words {tuple(words.shape)} hold no rows of {columns} weights")
    return bits, 0 if scale is None else STEP // scale.shape[3]


def fragment_linear(
    x: Tensor,
    words: Tensor,
    row_scale: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Multiply x [..., in] by weights in the CUDA layout: [..., out] in the type of `x`.

    Sums and weights are float32; arguments as in `kernels.device_ops.fragment_linear`.
    """
    bits, group_size = stored_format(words, scale, x.shape[-1])
    tiles = words.flatten(2)
    packed = Fragments(
        tiles, row_scale, scale, zero_point, bits, group_size, row_scale.shape[0], x.shape[-1]
    )
    codes, natural, zeros = unpack_fragments(packed)
    covered = x.shape[-1] if group_size == 0 else natural.shape[1] * group_size
    codes = functional.pad(codes, (0, covered - x.shape[-1]))
    weight = dequantize(codes, natural, zeros, bits)[:, : x.shape[-1]].to(x.device)
    bias = None if bias is None else bias.float()
    return functional.linear(x.float(), weight, bias).to(x.dtype)


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes [tokens, in] and float32 scales [tokens, 1] of x [tokens, in].

    x is about scale * code, with scale = max |x| / 127 of the token, 1 where that is 0.
    """
    scale = x.float().abs().amax(-1, keepdim=True) / CODE
    scale = torch.where(scale == 0, 1, scale)
    codes = (x.float() / scale).round_().clamp_(-CODE, CODE)
    # What is not finite has no code; its scale carries it on.
    return codes.nan_to_num_().to(torch.int8), scale


def w8a8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x, rounded to int8 per token, by int8 weights; as `kernels.device_ops.w8a8_linear`.

    The sums of products are exact: whole numbers below 2**53 in float64.
    """
    out, columns = scale.shape[0], x.shape[-1]
    codes, step = round_tokens(x.reshape(-1, columns))
    y = (codes.double() @ weight[:out, :columns].double().T).float()
    y = y * scale * step
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], out)


def grouping(columns: int, bits: int, group_size: int) -> tuple[int, int]:
    """Return the number of groups of a row and the inputs of each.

    Raises:
        ConfigError: there is no such format.
    """
    if bits not in CODES_PER_UNIT:
        raise ConfigError(f"no packed layout for {bits} bits; there is one for 8, 4, 3 and 2")
    if group_size == -1:
        return 1, columns
    if group_size <= 0 or group_size % 8:
        raise ConfigError(f"groups of {group_size} inputs: give a multiple of 8, or -1")
    return -(-columns // group_size), group_size


def quantize_pack(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a matrix by the range of each group; as `kernels.device_ops.quantize_pack`."""
    groups, size = grouping(weight.shape[1], bits, group_size)
    padded = functional.pad(weight.float(), (0, groups * size - weight.shape[1]))
    grouped = padded.reshape(weight.shape[0], groups, size)
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    levels, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        scale = _half_scale(torch.maximum(-low, high) / (middle - 1))
        zeros = torch.full_like(low, middle)
    else:
        # Divided first: the difference of two large numbers can overflow.
        scale = _half_scale(high / levels - low / levels)
        zeros = (-low / scale.float()).round_().clamp_(0, levels)
    codes = (grouped / scale.float().unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1))
    packed = pack(codes.clamp_(0, levels).to(torch.uint8).flatten(-2), bits)
    return packed, scale, zeros[: 0 if symmetric else None].to(torch.uint8)


def _half_scale(scale: Tensor) -> Tensor:
    """Round scales to float16: below its normal numbers upwards, and 1 for a group of zeros."""
    step = HALF.smallest_normal * HALF.eps
    raised = (scale / step).ceil_().clamp_(min=1).mul_(step)
    stored = torch.where(scale < HALF.smallest_normal, raised, scale)
    return torch.where(scale == 0, 1, stored).half()
