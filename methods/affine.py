"""Scale and zero_point arithmetic: weight = scale * (code - zero_point).

Conventions (those of round-to-nearest in GPTQ, OmniQuant and torchao, with the scale as stored):

- asymmetric: the range of a group is widened to include 0; scale = (max - min) / (2**bits - 1),
  zero_point = round(-min / scale), code = clamp(round(w / scale) + zero_point, 0, 2**bits - 1);
- symmetric: scale = max|w| / (2**(bits - 1) - 1), q = clamp(round(w / scale), -2**(bits - 1),
  2**(bits - 1) - 1), stored as code = q + 2**(bits - 1). At 2 bits that is ternary: no q is -2;
- `round` takes ties to the even number, as IEEE 754 and torch do;
- the scale is rounded to the type it is stored in before any code is computed, so what is stored
  is what was rounded to.

Everything is vectorised and runs over chunks of rows, so that memory beyond the weight stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels import reference
from kernels.errors import ConfigError
from methods.layers import check_finite
from methods.weight_divergence import bins_for, centres, divergence, histogram

BITS = (8, 4, 3, 2)
SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
SEARCHES = ("minmax", "percentile", "mse", "kl")
SMALLEST_GROUP, LARGEST_GROUP = 16, 1024
PER_CHANNEL = -1

SHRINK_FACTORS = tuple(1 - 0.02 * step for step in range(46))
"""Factors on the min/max range that `mse` and `kl` try: 1.0 down to 0.1. With normal weights the
best 2-bit range of a group of 128 is about 0.6 of min/max, of a row of 4096 about 0.4; an outlier
of ten standard deviations takes it below 0.2."""

Parameters = tuple[Tensor, Tensor | None]
"""Stored scale and uint8 zero point (None: symmetric), of one shape."""

CHUNK_WEIGHTS = 1 << 20
"""Weights handled at once: 4 MiB of float32, which stays in the cache."""


@dataclass(frozen=True)
class Affine:
    """How weights are rounded.

    Attributes:
        bits: 8, 4, 3 or 2.
        group_size: consecutive inputs that share a scale, 16 to 1024; -1 is per channel.
        symmetric: no zero point.
        per_tensor: one scale a matrix.
        scale_search: `minmax`; `percentile` (range between the quantiles of each group);
            `mse` (the factor on the min/max range with the least squared error); `kl` (the factor
            with the least divergence of histograms: `methods.weight_divergence`).
        percentile: upper quantile in percent for `percentile`, above 50.
        scale_dtype: stored type of a scale: `float16`, `bfloat16`, `float32`.

    Raises:
        ConfigError: an option is outside what is said here.
    """

    bits: int
    group_size: int = PER_CHANNEL
    symmetric: bool = False
    per_tensor: bool = False
    scale_search: str = "minmax"
    percentile: float = 99.9
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in BITS:
            raise ConfigError(f"bits is {self.bits}; weights can have 8, 4, 3 or 2 bits")
        size = self.group_size
        grouped = isinstance(size, int) and SMALLEST_GROUP <= size <= LARGEST_GROUP
        if not grouped and size != PER_CHANNEL:
            raise ConfigError(
                f"group_size is {self.group_size}; it must be {SMALLEST_GROUP} to {LARGEST_GROUP} "
                "inputs, or -1 for one scale a channel"
            )
        if self.per_tensor and self.group_size != PER_CHANNEL:
            raise ConfigError(
                f"per_tensor means one scale a matrix, so group_size {self.group_size} has no "
                "meaning with it; set group_size=-1"
            )
        if self.scale_search not in SEARCHES:
            raise ConfigError(
                f"scale_search is {self.scale_search!r}; it must be one of {', '.join(SEARCHES)}"
            )
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile is {self.percentile}; it must be above 50, at most 100")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ConfigError(
                f"scale_dtype is {self.scale_dtype!r}; it must be one of {', '.join(SCALE_DTYPES)}"
            )

    def groups(self, width: int) -> int:
        """Return the number of groups a row of `width` weights has, the last one padded."""
        return 1 if self.group_size == PER_CHANNEL else -(-width // self.group_size)

    def padded(self, width: int) -> int:
        """Return the width of a row with its last group filled."""
        return width if self.group_size == PER_CHANNEL else self.groups(width) * self.group_size


@dataclass(frozen=True)
class Quantized:
    """Codes and their parameters, unpacked.

    Attributes:
        codes: uint8 [..., out, in], `in` padded to whole groups by zero weights.
        scale: stored type, [..., out, groups], or [..., 1, 1] for one a matrix.
        zero_point: uint8 of the shape of `scale`; None where symmetric.
        bits: bits of a code.
        columns: true width of a row.
        subnormal_scales: how many scales lie below the smallest normal number of their type and
            so have fewer significant digits.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    columns: int
    subnormal_scales: int


def quantize(name: str, weight: Tensor, affine: Affine) -> Quantized:
    """Round `weight`, floating [out, in] or a stack [count, out, in]; `name` is for errors.

    Raises:
        ConfigError: the weight is not finite, or a scale exceeds the type it is stored in.
    """
    check_finite(name, weight)
    if weight.ndim == 2:
        return _quantize_matrix(name, weight, affine)
    parts = [_quantize_matrix(f"{name}[{i}]", matrix, affine) for i, matrix in enumerate(weight)]
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    return Quantized(
        codes=torch.stack([part.codes for part in parts]),
        scale=torch.stack([part.scale for part in parts]),
        zero_point=torch.stack(zero_points) if zero_points else None,
        bits=affine.bits,
        columns=parts[0].columns,
        subnormal_scales=sum(part.subnormal_scales for part in parts),
    )


def dequantize(quantized: Quantized) -> Tensor:
    """Return the float32 weights [..., out, columns] that the codes stand for."""
    weight = reference.dequantize(
        quantized.codes, quantized.scale, quantized.zero_point, quantized.bits
    )
    return weight[..., : quantized.columns]


def fake_quantize(name: str, weight: Tensor, affine: Affine) -> Tensor:
    """Return `weight` rounded and stored as float32; arguments and errors as `quantize`."""
    return dequantize(quantize(name, weight, affine))


def _quantize_matrix(name: str, weight: Tensor, affine: Affine) -> Quantized:
    lowest, highest = _limits(weight, affine)
    scale, zero_point = parameters(name, lowest, highest, affine)
    if affine.scale_search == "mse":
        scale, zero_point = _least(
            lambda grid: _squared_error(weight, affine, *grid), name, affine, lowest, highest
        )
    if affine.scale_search == "kl":
        scale, zero_point = _least_divergence(name, weight, affine, lowest, highest)
    codes = torch.cat(
        [
            _codes(groups, *_of_rows(scale, zero_point, rows), affine.bits)
            for rows, groups in _chunks(weight, affine)
        ]
    )
    subnormal = int((scale < torch.finfo(scale.dtype).smallest_normal).sum())
    return Quantized(codes, scale, zero_point, affine.bits, weight.shape[-1], subnormal)


def _chunks(weight: Tensor, affine: Affine) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows and float32 [rows, groups, group_size] of them, padded by zeros."""
    out, width = weight.shape
    step = max(1, CHUNK_WEIGHTS // width)
    padding = affine.padded(width) - width
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        chunk = functional.pad(weight[rows].float(), (0, padding))
        yield rows, chunk.reshape(chunk.shape[0], affine.groups(width), -1)


def _of_rows(scale: Tensor, zero_point: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Return the parameters of `rows`; those that stand for all rows are returned whole."""
    if scale.shape[0] == 1:
        return scale, zero_point
    return scale[rows], None if zero_point is None else zero_point[rows]


def _limits(weight: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Return the float32 range of each group that its codes will span, [out, groups] or [1, 1]."""
    fraction = affine.percentile / 100 if affine.scale_search == "percentile" else 1.0
    if affine.per_tensor:
        flat = weight.float().reshape(1, 1, -1)
        return _range(flat, fraction, affine.symmetric)
    pairs = [_range(groups, fraction, affine.symmetric) for _, groups in _chunks(weight, affine)]
    return torch.cat([low for low, _ in pairs]), torch.cat([high for _, high in pairs])


def _range(groups: Tensor, fraction: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the range of [rows, groups, size] between the quantiles 1 - fraction and fraction.

    Symmetric: plus and minus the quantile of the magnitudes. Always includes 0.
    """
    if symmetric:
        highest = _upper_quantile(groups.abs(), fraction)
        return -highest, highest
    lowest = -_upper_quantile(-groups, fraction) if fraction < 1 else groups.amin(-1)
    return lowest.clamp_(max=0), _upper_quantile(groups, fraction).clamp_(min=0)


def _upper_quantile(values: Tensor, fraction: float) -> Tensor:
    """Return the linearly interpolated quantile over the last axis.

    `torch.quantile` sorts everything and refuses more than 16 M values; only the top is needed.
    """
    if fraction == 1:
        return values.amax(-1)
    from_top = (values.shape[-1] - 1) * (1 - fraction)
    index = int(from_top)
    top = values.topk(min(index + 2, values.shape[-1]), dim=-1).values
    below = top[..., min(index + 1, top.shape[-1] - 1)]
    return torch.lerp(top[..., index], below, from_top - index)


def parameters(
    name: str, lowest: Tensor, highest: Tensor, affine: Affine
) -> tuple[Tensor, Tensor | None]:
    """Return stored scale and uint8 zero point (None: symmetric) for ranges that include 0.

    `lowest` <= 0 <= `highest` are float32 of one shape, which the results have too.

    Raises:
        ConfigError: a scale exceeds the type it is stored in.
    """
    levels = 2**affine.bits - 1
    if affine.symmetric:
        scale = torch.maximum(-lowest, highest) / (2 ** (affine.bits - 1) - 1)
        return _stored_scale(name, scale, affine), None
    # Divided first: the difference of two large float32 numbers can overflow.
    scale = _stored_scale(name, highest / levels - lowest / levels, affine)
    zero_point = (-lowest / scale.float()).round_().clamp_(0, levels)
    return scale, zero_point.to(torch.uint8)


def _stored_scale(name: str, scale: Tensor, affine: Affine) -> Tensor:
    """Round scales to their stored type; no group that holds anything gets a zero.

    A group of zeros gets the scale 1. A scale below the smallest normal number is rounded up, so
    that the range is never cut: in float16 to the next subnormal number, in the other types (where
    that is below 1e-37) to the smallest normal one.
    """
    limits = torch.finfo(SCALE_DTYPES[affine.scale_dtype])
    if scale.numel() and float(scale.max()) > limits.max:
        raise ConfigError(
            f"weight {name} needs a scale of {float(scale.max()):.4g}, which {affine.scale_dtype} "
            f"cannot hold (largest {limits.max:.4g}); set scale_dtype=float32"
        )
    step = limits.smallest_normal
    if limits.dtype == "float16":
        step *= limits.eps
    raised = (scale / step).ceil_().clamp_(min=1).mul_(step)
    stored = torch.where(scale < limits.smallest_normal, raised, scale)
    stored = torch.where(scale == 0, torch.ones_like(scale), stored)
    return stored.to(SCALE_DTYPES[affine.scale_dtype])


def _codes(groups: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Return uint8 codes [rows, in] of float32 groups [rows, groups, size]."""
    offset = 2 ** (bits - 1) if zero_point is None else zero_point.float().unsqueeze(-1)
    rounded = (groups / scale.float().unsqueeze(-1)).round_()
    return rounded.add_(offset).clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)


def _least(
    cost: Callable[[Parameters], Tensor], name: str, affine: Affine, lowest: Tensor, highest: Tensor
) -> Parameters:
    """Return the parameters whose range is the shrunken min/max range with the least `cost`.

    The factor 1 is tried first and another must be better, so the cost is never above min/max's.
    """
    best_scale, best_zero = parameters(name, lowest, highest, affine)
    best = cost((best_scale, best_zero))
    for factor in SHRINK_FACTORS[1:]:
        scale, zero_point = parameters(name, lowest * factor, highest * factor, affine)
        found = cost((scale, zero_point))
        better = found < best
        best = torch.where(better, found, best)
        best_scale = torch.where(better, scale, best_scale)
        if best_zero is not None and zero_point is not None:
            best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


def _least_divergence(
    name: str, weight: Tensor, affine: Affine, lowest: Tensor, highest: Tensor
) -> Parameters:
    """Return the parameters whose range is the shrunken one with the least divergence."""

    def search(counts: Tensor, low: Tensor, high: Tensor) -> Parameters:
        middles = centres(low, high, bins)
        return _least(
            lambda grid: divergence(counts, middles, *grid, affine.bits), name, affine, low, high
        )

    if affine.per_tensor:
        bins = bins_for(weight.numel())
        counts = torch.zeros(1, 1, bins, dtype=torch.float64)
        for _, groups in _chunks(weight, affine):
            counts += histogram(groups.reshape(1, 1, -1), lowest, highest, bins)
        return search(counts, lowest, highest)
    found = []
    for rows, groups in _chunks(weight, affine):
        bins = bins_for(groups.shape[-1])
        counts = histogram(groups, lowest[rows], highest[rows], bins)
        found.append(search(counts, lowest[rows], highest[rows]))
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def _squared_error(
    weight: Tensor, affine: Affine, scale: Tensor, zero_point: Tensor | None
) -> Tensor:
    """Return the squared rounding error, float64 of the shape of `scale`."""
    errors = []
    for rows, groups in _chunks(weight, affine):
        own_scale, own_zero = _of_rows(scale, zero_point, rows)
        codes = _codes(groups, own_scale, own_zero, affine.bits)
        restored = reference.dequantize(codes, own_scale, own_zero, affine.bits)
        difference = restored.view_as(groups).sub_(groups).square_()
        errors.append(difference.sum(-1, dtype=torch.float64))
    total = torch.cat(errors)
    return total.sum().reshape(1, 1) if affine.per_tensor else total
