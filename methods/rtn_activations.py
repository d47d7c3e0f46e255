"""Round-to-nearest with INT8 activations: integers times integers, one activation scale a token.

Activations are symmetric, step = max|token| / 127, rounded at each call, as in `zeroquant`
(`methods.rounded_activations`); weights are those of `methods.rtn`, whatever their bits. Within a
group the product is a sum of integers; the scales of groups and of the token are floating point:

    y[o] = step * sum over groups g of scale[o, g] * sum over i in g of (q[o, i] - z[o, g]) * a[i]

`TokenLinear` computes that plainly in float64, where sums of integers are exact, or hands the
stored weight to a kernel that multiplies integers. A token's result does not depend on others.

A kernel is a class built from a `kernels.stored.Stored`, as those of `methods.linear` are. It has
`kernel` (its name), `dtypes` (of activations it reads as they are), `refusal(group_size)`, and a
`forward(x)` that rounds x itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kernels import compiler, cpu, gpu, host_build
from kernels.errors import ConfigError
from kernels.reference import dequantize_packed
from kernels.stored import Stored
from methods import artefact as artefacts
from methods.base import Hardware
from methods.linear import Layout, QuantizedLinear, QuantizedModule, empty
from methods.rounded_activations import token_codes

IntegerLinear = cpu.Int8ActivationLinear | gpu.Int8ActivationLinear

BITS = 8
"""The only width of activations that integer kernels read."""

NOTE = (
    "activations of linear maps are rounded to INT8 at each call, one scale a token; those of "
    "embeddings and of stacks of experts, and all between the linear maps, are not"
)


def integer_kernel(
    name: str, bits: int, group_size: int, symmetric: bool, hardware: Hardware
) -> tuple[type[IntegerLinear] | None, str]:
    """Return the integer kernel for a linear map called `name`, or None; a remark on the choice.

    Bits of weights for which the hardware has no integer kernel at all are multiplied plainly: that
    is how the scheme runs there, and no fallback. It is one where the kernel refuses a group size
    or zero points, and where it rounds activations to a type of its own before it rounds them.

    Raises:
        ConfigError: it would be a fallback, which `hardware` does not allow.
    """
    kernels, missing = _kernels(hardware.device)
    linear = kernels.get(bits)
    if linear is None:
        remark = f"no integer kernel for {bits} bits on {hardware.device}"
        return None, f"{remark}: {missing}" if missing else remark
    refusal, change = linear.refusal(group_size), "group_size"
    if refusal is None and hardware.device != "cpu" and not symmetric:
        refusal, change = "takes no zero points", "method.symmetric"
    narrow = getattr(torch, hardware.compute_dtype) not in linear.dtypes
    if refusal is None and not narrow:
        return linear, ""
    if not hardware.allow_fallback:
        cause = refusal or "takes activations of 16 bits"
        change = change if refusal else "hardware.compute_dtype"
        raise ConfigError(
            f"{name}: {linear.kernel} {cause}, and hardware.allow_fallback is false; choose "
            f"another {change} or set hardware.allow_fallback=true"
        )
    if refusal is None:
        return linear, "bfloat16 activations"
    return None, f"{linear.kernel} {refusal}"


def _kernels(device: str) -> tuple[Mapping[int, type[IntegerLinear]], str]:
    """Return bits of weights -> integer kernel on `device`; and why there are none here."""
    on_card = device != "cpu"
    missing = compiler.unavailable() if on_card else host_build.unavailable()
    if missing is not None:
        return {}, missing
    return (gpu if on_card else cpu).INT8_ACTIVATION_LINEARS, ""


class TokenLinear(QuantizedLinear):
    """Packed weights times tokens rounded to INT8: [..., in] -> [..., out] in the input's type."""

    converter = "INT8 per token, then dequantize + torch.matmul in float64"
    activation_bits = BITS

    def prepare(self, name: str, hardware: Hardware, packed: bool = True) -> None:
        """Hand the stored weights to the hardware's integer kernel, if it has one."""
        super().prepare(name, hardware, packed=False)
        if not packed:
            return
        layout = self.layout
        linear, self._remark = integer_kernel(
            name, layout.bits, layout.group_size, layout.symmetric, hardware
        )
        if linear is None:
            return
        codes, scale, zero_point = self.stored()
        stored = Stored(
            codes, scale, zero_point, layout.bits, layout.group_size, layout.in_features
        )
        self.add_module("linear", linear(stored))
        self._kernel = linear.kernel
        self.packed = self.scale = self.zero_point = None

    def forward(self, x: Tensor) -> Tensor:
        """Round each token, multiply by the weight, add the bias."""
        if self._kernel is not None:
            return super().forward(x)
        packed, scale, zero_point = self.stored()
        bits, group_size = self.layout.bits, self.layout.group_size
        weight = dequantize_packed(packed, scale, zero_point, bits, group_size, x.shape[-1])
        y = integer_linear(x, weight)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)


def integer_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [..., in], its tokens rounded to INT8, by float32 weight [out, in]: float64.

    `weight` = scale * (code - zero_point) is exact in float32 for scales of 16 bits, so the sums
    are those of the integers, but for the last bits of a float64.
    """
    codes, step = token_codes(x)
    return functional.linear(codes.double(), weight.double()).mul_(step)


def build(facts: artefacts.Facts) -> QuantizedModule:
    """Return the module that JSON `facts` describe; a linear map rounds its tokens."""
    return TokenLinear(Layout(**facts)) if facts["kind"] == "linear" else empty(facts)
