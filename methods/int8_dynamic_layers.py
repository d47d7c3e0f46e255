"""The modules of `int8_dynamic`: what lies in the artefact, and what runs it on a CPU or a card.

`Stored...` modules hold plain tensors and never run; `Packed...` and `TorchaoLinear` are made from
them when an artefact is loaded. Conventions: see `methods/int8_dynamic.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.artefact import Facts

ENGINE_LIBRARIES = {"x86": "x86 (fbgemm)"}

# torch._int_mm on CUDA wants more than 16 rows, and widths that are multiples of 8. Where they are
# not, torchao says nothing and multiplies in float32, or even on the CPU.
INT_MM_ROWS = 32
INT_MM_MULTIPLE = 8


@contextmanager
def announced_removals_silenced() -> Iterator[None]:
    """Silence the two announcements that PyTorch's INT8 modules will move one day.

    They tell the reader of this file to migrate, not the user of the tool; the version that is
    installed is pinned, and a test fails where the modules are gone.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", r"torch\.quantize_per_tensor, torch\.quant", UserWarning)
        yield


class StoredLinear(nn.Module):
    """A linear map as it lies in the artefact: int8 weight [out, in], scale, zero_point, bias."""

    def __init__(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.scale = nn.Buffer(scale)
        self.zero_point = nn.Buffer(zero_point)
        self.bias = nn.Buffer(bias) if bias is not None else None

    @classmethod
    def empty(cls, facts: Facts) -> StoredLinear:
        """Return the module that `facts` describe, without values (on meta)."""
        out_features, in_features = facts["out_features"], facts["in_features"]
        scales = out_features if facts["per_channel"] else 1
        with torch.device("meta"):
            return cls(
                torch.empty(out_features, in_features, dtype=torch.int8),
                torch.empty(scales),
                torch.empty(scales, dtype=torch.int32),
                torch.empty(out_features) if facts["bias"] is not None else None,
            )

    @classmethod
    def of(cls, linear: Any, bias: Tensor | None) -> StoredLinear:
        """Return the integers and scales of PyTorch's dynamic `linear`, exactly, and its `bias`."""
        weight = linear.weight()
        if weight.qscheme() == torch.per_channel_affine:
            scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        else:
            scale = torch.tensor([weight.q_scale()], dtype=torch.float64)
            zero_point = torch.tensor([weight.q_zero_point()])
        return cls(weight.int_repr(), scale.float(), zero_point.int(), bias)


class PackedLinear(nn.Module):
    """PyTorch's dynamic INT8 linear: float32 [..., in] -> [..., out].

    With `dequantized` set the same rounded values are multiplied in float64 instead, to be compared
    with the kernel.
    """

    # PyTorch's quantized modules carry no types.
    linear: Any

    def __init__(self, stored: StoredLinear) -> None:
        super().__init__()
        out_features, in_features = stored.weight.shape
        engine = torch.backends.quantized.engine
        self.kernel = f"quantized::linear_dynamic, engine {ENGINE_LIBRARIES.get(engine, engine)}"
        # qnnpack takes all eight bits, whatever it is asked.
        self.reduce_range = engine != "qnnpack"
        self.dequantized = False
        self.scale = stored.scale
        with announced_removals_silenced():
            from torch.ao.nn.quantized import dynamic

            build: Any = dynamic.Linear
            self.linear = build(in_features, out_features)
            if stored.scale.numel() == 1:
                weight = torch._make_per_tensor_quantized_tensor(
                    stored.weight, float(stored.scale), int(stored.zero_point)
                )
            else:
                weight = torch._make_per_channel_quantized_tensor(
                    stored.weight, stored.scale.double(), stored.zero_point.long(), 0
                )
            bias = stored.bias.float() if stored.bias is not None else None
            self.linear.set_weight_bias(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` by its own range, multiply integers, return float32."""
        if not self.dequantized:
            y: Tensor = self.linear(x)
            return y
        # As fbgemm has it: one fused multiplication and addition, then half to even. The range is
        # cut into 127 steps, but clamped at 255: rounding both ends outwards can reach 128.
        scale, zero_point = torch._choose_qparams_per_tensor(x, self.reduce_range)
        step = torch.tensor(scale)
        q = (x.double() * step.reciprocal().double() + zero_point).float().round_().clamp_(0, 255)
        with announced_removals_silenced():
            weight = self.linear.weight()
        product = (q - zero_point).double() @ weight.int_repr().double().T
        # The sum as a float32, then again one fused multiplication and addition.
        scales = step * self.scale
        y = product.float().double() * scales.double()
        bias = self.linear.bias()
        return (y if bias is None else y + bias.double()).float()


class TorchaoLinear(nn.Module):
    """The same stored weights under torchao's dynamic INT8: [..., in] -> [..., out] in any float.

    Exercised on a card only: there torchao calls cuBLAS through `torch._int_mm`. In eager mode it
    also formats its input at each call (`safe_int_mm` looks for "FakeTensor" in the repr), which
    costs a synchronization: speed on a card is that of eager torchao, not of compiled torchao.
    """

    kernel = "torchao Int8Tensor: aten::_int_mm"

    def __init__(self, stored: StoredLinear, dtype: torch.dtype) -> None:
        super().__init__()
        from torchao.quantization import Int8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

        out_features, in_features = stored.weight.shape
        rows = out_features if stored.scale.numel() == 1 else 1
        self.dequantized = False
        self.activations = QuantizeTensorToInt8Kwargs(granularity=PerRow())
        self.weight = nn.Parameter(
            Int8Tensor(
                stored.weight,
                stored.scale[:, None],
                [rows, in_features],
                dtype,
                zero_point=stored.zero_point[:, None].to(torch.int8),
                act_quant_kwargs=self.activations,
            ),
            requires_grad=False,
        )
        self.bias = nn.Buffer(stored.bias.to(dtype)) if stored.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Round each token of `x` by its own largest magnitude, multiply, return x's type."""
        tokens = x.reshape(-1, x.shape[-1])
        if self.dequantized:
            y = self._dequantized(tokens)
        else:
            missing = max(INT_MM_ROWS - tokens.shape[0], 0)
            padded = functional.pad(tokens, (0, 0, 0, missing))
            y = functional.linear(padded, self.weight, self.bias)[: tokens.shape[0]]
        return y.reshape(*x.shape[:-1], -1)

    def _dequantized(self, tokens: Tensor) -> Tensor:
        from torchao.quantization import Int8Tensor

        rounded = Int8Tensor.from_hp(tokens, self.activations.granularity).dequantize()
        weight: Any = self.weight
        return functional.linear(rounded, weight.dequantize(), self.bias)


class StoredEmbedding(nn.Module):
    """An embedding as it lies in the artefact: uint8 [rows, width], scale and zero_point [rows]."""

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.scale = nn.Buffer(scale)
        self.zero_point = nn.Buffer(zero_point)

    @classmethod
    def empty(cls, facts: Facts) -> StoredEmbedding:
        """Return the module that `facts` describe, without values (on meta)."""
        rows, width = facts["out_features"], facts["in_features"]
        with torch.device("meta"):
            weight = torch.empty(rows, width, dtype=torch.uint8)
            return cls(weight, torch.empty(rows), torch.empty(rows))

    @classmethod
    def of(cls, embedding: Any) -> StoredEmbedding:
        """Return what PyTorch's quantized `embedding` holds, in its exact values."""
        weight = embedding.weight()
        # Copies: what unpacking hands out can point into the packed memory.
        return cls(
            weight.int_repr().clone(),
            weight.q_per_channel_scales().clone(),
            weight.q_per_channel_zero_points().clone(),
        )


class PackedEmbedding(nn.Module):
    """PyTorch's quantized embedding: int64 ids [...] -> float32 [..., width]."""

    kernel = "quantized::embedding_byte"
    embedding: Any

    def __init__(self, stored: StoredEmbedding) -> None:
        super().__init__()
        rows, width = stored.weight.shape
        self.dequantized = False
        with announced_removals_silenced():
            from torch.ao.nn import quantized

            self.embedding = quantized.Embedding(rows, width)
            self.embedding.set_weight(
                torch._make_per_channel_quantized_tensor(
                    stored.weight, stored.scale, stored.zero_point, 0
                )
            )

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids`."""
        if not self.dequantized:
            # The kernel refuses ids that are strided.
            rows: Tensor = self.embedding(ids.contiguous())
            return rows
        with announced_removals_silenced():
            weight = self.embedding.weight()
        scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        q = weight.int_repr()[ids].float()
        # As the kernel has it: scale * q + (-zero_point * scale), which rounds otherwise.
        shift = -zero_point * scale
        return torch.addcmul(shift[ids][..., None], q, scale[ids][..., None])
