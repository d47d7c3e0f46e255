"""FP32, BF16 and FP16: the unquantized model, stored and run in one floating type.

FP16 arithmetic on a CPU is emulated and over a hundred times slower than BF16. There the weights
stay FP16 in memory and each matrix is converted to FP32 when it is called: state `dequantized`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.decode_step import Weights, dense
from kernels.errors import ConfigError
from methods import artefact as artefacts
from methods.base import Engine, Hardware, KernelUse, Matrix, QuantizeReport
from methods.decode import fast_decode
from methods.encoder_engine import EncoderEngine
from methods.encoders import is_encoder
from methods.engine import TorchEngine
from methods.fused import fuse, told
from methods.layers import Scope, bias_of, check_finite, replace, select, weight_of
from methods.offload import offloaded_engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ConvertedLinear(nn.Module):
    """A linear map kept in FP16 and converted to FP32 at each call: [..., in] -> [..., out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.bias = nn.Buffer(bias.float()) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the converted weight."""
        return functional.linear(x, self.weight.float(), self.bias)

    def in_c(self, dtype: torch.dtype) -> Weights | str:
        """Return the matrix for the decode step in C, which converts the weights as it reads."""
        if dtype != torch.float32:
            return f"weights converted to float32, and activations in {dtype}"
        return dense(self.weight, self.bias)


class ConvertedStack(nn.Module):
    """A stack of experts kept in FP16, converted to FP32 one expert at a time."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)

    def __getitem__(self, index: Tensor | int) -> Tensor:
        """Return the float32 weight of expert `index`."""
        return self.weight[index].float()


class ConvertedEmbedding(nn.Module):
    """An embedding kept in FP16 whose rows are converted to FP32 when read."""

    def __init__(self, weight: Tensor, padding: int | None) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.padding_idx = padding

    def forward(self, ids: Tensor) -> Tensor:
        """Return float32 rows for int64 `ids`."""
        return functional.embedding(ids, self.weight).float()


@dataclass(frozen=True)
class Unquantized:
    """The model as it is, in one floating type."""

    name: str
    dtype: str

    needs_calibration: ClassVar[bool] = False
    offloads: ClassVar[bool] = True
    encoders: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"method.dtype is {self.dtype!r}; it must be one of {list(DTYPES)}")

    @property
    def bits(self) -> float:
        """Width of the type."""
        return 8.0 * DTYPES[self.dtype].itemsize

    @property
    def group_size(self) -> int | None:
        """No scales, no groups."""
        return None

    @property
    def rest_dtype(self) -> str:
        """Everything else is stored in the type, too."""
        return self.dtype

    def check(self, hardware: Hardware) -> None:
        """Every machine stores and runs these types."""

    def stored_bits(self, matrix: Matrix) -> int:
        """One value of the type a weight."""
        return matrix.weights * 8 * DTYPES[self.dtype].itemsize

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the matrices a quantizing method would cover, so that rows compare."""
        selection = select(model, Scope())
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Store every parameter in the type."""
        matrices, left_out = self.select(model)
        for name, parameter in model.named_parameters():
            check_finite(name, parameter)
            if not bool(torch.isfinite(parameter.to(DTYPES[self.dtype])).all()):
                raise ConfigError(
                    f"weight {name} overflows in {self.dtype}; use bf16 or fp32 for this model"
                )
        artefacts.save(model, into, {}, DTYPES[self.dtype])
        stored = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, stored, left_out, unquantized=self.dtype)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load for `hardware`; FP16 on a CPU stays FP16 in memory and is computed in FP32."""
        dtype = DTYPES[self.dtype]
        first = "cpu" if hardware.offload else hardware.device
        model = artefacts.load(artefact, _nothing_replaced, dtype, first)
        matrices, _ = self.select(model)
        if dtype == torch.float16 and hardware.device == "cpu":
            uses = _compute_in_float32(model, matrices)
        else:
            uses = [
                KernelUse(
                    m.name,
                    "Experts" if m.count > 1 else "Linear",
                    "torch.linear",
                    "packed",
                    m.weights,
                )
                for m in matrices
            ]
        if hardware.offload:
            return offloaded_engine(model, hardware, uses, artefact)
        if hardware.device == "cuda":
            uses = told(uses, fuse(model))
        if is_encoder(model):
            return EncoderEngine(model, hardware.device, uses)
        fast, remark = fast_decode(model, hardware)
        return TorchEngine(model, hardware.device, uses, fast=fast, remark=remark)


def _nothing_replaced(name: str, facts: artefacts.Facts) -> nn.Module:
    raise ValueError(f"an unquantized artefact replaces no layer, but {name} is listed")


def _compute_in_float32(model: Any, matrices: list[Matrix]) -> list[KernelUse]:
    """Keep matrices, head and embedding in FP16, converted when called; the rest becomes FP32."""
    everything = select(model, Scope(head=True, embeddings=True)).matrices
    for matrix in everything:
        weight = weight_of(model, matrix)
        if matrix.role == "embedding":
            padding = model.get_submodule(matrix.name).padding_idx
            replace(model, matrix, ConvertedEmbedding(weight, padding))
        elif matrix.count > 1:
            owner, _, attribute = matrix.name.rpartition(".")
            replace(
                model, matrix, ConvertedStack(getattr(model.get_submodule(owner), attribute).data)
            )
        else:
            replace(model, matrix, ConvertedLinear(weight, bias_of(model, matrix)))
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return [
        KernelUse(m.name, "ConvertedLinear", "to(float32) + torch.linear", "dequantized", m.weights)
        for m in matrices
    ]
