"""The modules that run compressed-tensors weights as they are stored: INT8 and FP8 linear maps.

transformers turns such weights into floats at the first call; these keep the stored bytes. The
rounding of activations is that of compressed-tensors 0.19 (`quantization/utils/helpers.py`):
symmetric, scale = max|x| / 127.5 for INT8 and max|x| / (largest FP8 value) for FP8, over a token
(dynamic) or fixed for the whole matrix (static).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.errors import ConfigError
from methods.base import Execution, Hardware, KernelUse
from methods.int8_linear import DEQUANTIZED
from methods.int8_static import has_integer_kernel

Activations = Literal["none", "dynamic", "static"]

INT8_HALF_RANGE = 127.5
"""compressed-tensors divides the range by half of 255 steps, so -128 is used and +127.5 clamps."""

# torch._int_mm on CUDA wants more than 16 rows.
INT_MM_ROWS = 32

FP8_AS_FLOAT16 = {torch.float8_e4m3fn: (7, 2.0**8), torch.float8_e5m2: (8, 1.0)}
"""Bits to shift a code left to make it a float16, and the factor between the two values: E5M2 is
the upper half of a float16; E4M3 has the same order of fields and another exponent bias."""
SECOND_BIT = 1 << 14

# What torch._scaled_mm asks of a card (Ada, Hopper) and of both widths of a weight.
SCALED_MM_CAPABILITY = (8, 9)
SCALED_MM_MULTIPLE = 16


def token_scale(x: Tensor, largest: float) -> Tensor:
    """Return float32 [..., 1]: max|x| / `largest` of each row; a row of zeros gives float32's eps.

    As `calculate_qparams` of compressed-tensors has it.
    """
    scale = x.abs().amax(-1, keepdim=True) / largest
    return scale.masked_fill_(scale == 0, torch.finfo(scale.dtype).eps)


def fp8_values(codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return (values in `dtype`, factor): the FP8 tensor `codes` is their product.

    PyTorch's own cast from E4M3 takes 7 ns a weight on a CPU, this 0.2 ns. NaN is not kept:
    neither compressed-tensors nor this project stores it.
    """
    shift, factor = FP8_AS_FLOAT16[codes.dtype]
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(shift)
    if shift == 7:
        # The sign fills two bits by now; the second belongs to the exponent.
        bits.bitwise_and_(~SECOND_BIT)
    # By way of float32, since the cast from float16 to bfloat16 is slow.
    return bits.view(torch.float16).float().to(dtype), factor


def refuse_fallback(owner: str, hardware: Hardware) -> bool:
    """Return whether integers must be multiplied as floats; raise ConfigError where they must not.

    Without VNNI oneDNN sums in 16 bits, which can saturate.
    """
    missing = hardware.device == "cpu" and not has_integer_kernel()
    if missing and not hardware.allow_fallback:
        raise ConfigError(
            f"{owner}: this processor has no VNNI instructions to multiply INT8; with "
            "hardware.allow_fallback=true its weights are converted to float64 at each call"
        )
    return missing


class Int8Linear(nn.Module):
    """A W8A8 linear map: any float [..., in] -> the same type [..., out].

    weight int8 [out, in], scale float32 [out] or [1], input_scale float32 [1] or None (a scale a
    token), bias any float [out] or None. With `dequantized` set the same integers are multiplied
    in float64.
    """

    kernel = "aten::_int_mm, s8 x s8 -> s32"

    def __init__(
        self, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.scale = nn.Buffer(scale.flatten())
        self.input_scale = None if input_scale is None else nn.Buffer(input_scale.flatten())
        self.bias = None if bias is None else nn.Buffer(bias.float())
        self.dequantized = False

    def forward(self, x: Tensor) -> Tensor:
        """Round `x`, multiply integers, return x's type."""
        tokens = x.reshape(-1, x.shape[-1]).float()
        fixed = self.input_scale
        scale: Tensor = token_scale(tokens, INT8_HALF_RANGE) if fixed is None else fixed
        q = (tokens / scale).round_().clamp_(-128, 127)
        y = self._sums(q) * (scale * self.scale)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _sums(self, q: Tensor) -> Tensor:
        """Return the exact sums of `q` [tokens, in] times the weight as float32 [tokens, out]."""
        if self.dequantized:
            return (q.double() @ self.weight.double().T).float()
        rows = q.shape[0]
        if q.is_cuda:
            q = functional.pad(q, (0, 0, 0, max(INT_MM_ROWS - rows, 0)))
        return torch._int_mm(q.to(torch.int8), self.weight.T)[:rows].float()

    def prepare(self, name: str, hardware: Hardware) -> None:
        """Choose how `name` runs on `hardware`: without integer instructions in float64.

        Raises:
            ConfigError: that would be a fallback, which `hardware` does not allow.
        """
        self.dequantized = refuse_fallback(name, hardware)

    def use(self, name: str) -> KernelUse:
        """Return what runs this module."""
        execution: Execution = "dequantized" if self.dequantized else "packed"
        kernel = DEQUANTIZED if self.dequantized else self.kernel
        grid = "per token" if self.input_scale is None else "fixed scale"
        text = f"{kernel} (activations int8, {grid})"
        return KernelUse(name, type(self).__name__, text, execution, self.weight.numel())


class Fp8Linear(nn.Module):
    """A linear map of FP8 weights: any float [..., in] -> the same type [..., out].

    weight float8_e4m3fn or float8_e5m2 [out, in], scale float32 [out] or [1], bias any float [out]
    or None. `activations` none: they stay as they are; dynamic: rounded to the weight's type with
    a scale a token; static: with `input_scale`, float32 [1]. Weights are converted at each call,
    or multiplied as they are by `torch._scaled_mm` where `prepare` finds a card for it.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        activations: Activations,
        input_scale: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.scale = nn.Buffer(scale.flatten())
        self.activations = activations
        self.input_scale = None if input_scale is None else nn.Buffer(input_scale.flatten())
        self.bias = None if bias is None else nn.Buffer(bias)
        self.packed = False
        self.dtype = "float32"

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` where asked, multiply, return x's type."""
        q = x
        scale: Tensor = self.scale
        if self.activations != "none":
            codes, own = self._rounded(x.reshape(-1, x.shape[-1]).float())
            if self.packed:
                return self._scaled_mm(codes, own, x.dtype).reshape(*x.shape[:-1], -1)
            values, factor = fp8_values(codes, x.dtype)
            q, own = values.reshape(x.shape), own.reshape(*x.shape[:-1], 1) * factor
            scale = scale * own
        weight, factor = fp8_values(self.weight, x.dtype)
        y = functional.linear(q, weight).float() * (scale * factor)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)

    def _rounded(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return (FP8 codes [tokens, in], scale float32 [tokens, 1]) of float32 `tokens`."""
        largest = torch.finfo(self.weight.dtype).max
        if self.input_scale is None:
            scale = token_scale(tokens, largest)
        else:
            scale = self.input_scale.expand(tokens.shape[0], 1)
        codes = (tokens / scale).clamp_(-largest, largest).to(self.weight.dtype)
        return codes, scale

    def _scaled_mm(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.scale.expand(self.weight.shape[0])[None]
        y = torch._scaled_mm(
            codes, self.weight.t(), scale.contiguous(), rows.contiguous(), out_dtype=torch.bfloat16
        )
        return (y if self.bias is None else y + self.bias).to(dtype)

    def prepare(self, name: str, hardware: Hardware) -> None:
        """Choose how `name` runs on `hardware`: FP8 products only where a card has them."""
        self.dtype = hardware.compute_dtype
        # On a CPU the same op takes 10 to 60 times as long as a product of floats.
        self.packed = (
            hardware.device == "cuda"
            and self.activations != "none"
            and self.weight.dtype == torch.float8_e4m3fn
            and not any(size % SCALED_MM_MULTIPLE for size in self.weight.shape)
            and torch.cuda.get_device_capability() >= SCALED_MM_CAPABILITY
        )

    def use(self, name: str) -> KernelUse:
        """Return what runs this module."""
        kind = str(self.weight.dtype).removeprefix("torch.")
        grids = {"dynamic": ", per token", "static": ", fixed scale", "none": ""}
        own = self.dtype if self.activations == "none" else kind
        kernel = "aten::_scaled_mm" if self.packed else f"{kind} to {self.dtype} + aten::linear"
        execution: Execution = "packed" if self.packed else "dequantized"
        text = f"{kernel} (activations {own}{grids[self.activations]})"
        return KernelUse(name, type(self).__name__, text, execution, self.weight.numel())
