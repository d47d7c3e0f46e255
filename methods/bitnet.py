"""BitNet b1.58 after training: ternary weights by their mean magnitude, INT8 activations per token.

Ma et al. 2024 (arXiv 2402.17764), section 2: scale = mean |W| over the matrix, at least 1e-5,
weight = scale * clamp(round(W / scale), -1, 1); activations are rounded to INT8, symmetric, with
one scale a token. BitNet trains a model with these roundings from the start. Here they are put
onto a model that was trained without: it is far below what BitNet models reach, and shows why they
have to be trained. BitLinear's own normalisation of its input is trained too, and not added.

Five ternary values are stored in a byte (`kernels.ternary`): 1.6 bits a weight, the scale apart.
PyTorch has no kernel that adds and subtracts by ternary weights, so they are converted at each call
and multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.errors import ConfigError
from kernels.ternary import BYTES_USED, pack, packed_bytes, unpack
from methods import artefact as artefacts
from methods.artefact import dtype_name, stored_bias
from methods.base import Engine, Hardware, KernelUse, Matrix, QuantizeReport
from methods.layers import Scope, check_finite, replace, select_linears, weight_of
from methods.options import names, refuse_emulated
from methods.rounded_activations import (
    STACKED_EXPERTS,
    load_engine,
    round_tokens,
)

BITS = 1.58
"""log2(3), as the method's name has it."""

SMALLEST_SCALE = 1e-5
POST_TRAINING = (
    "rounded after training: the model was not trained with ternary weights, so this is not what "
    "BitNet b1.58 models reach"
)


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round floating weight [out, in] to int8 -1, 0, 1 of its shape and a float32 scale [1]."""
    scale = weight.abs().mean(dtype=torch.float64).clamp_(min=SMALLEST_SCALE).float()
    values = (weight.float() / scale).round_().clamp_(-1, 1)
    return values.to(torch.int8), scale.reshape(1)


class TernaryLinear(nn.Module):
    """A linear map with ternary weights: [..., in] -> [..., out] in the type of its input.

    Stored: packed uint8 [out, packed_bytes(in)], scale float32 [1], bias in any float [out].
    """

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        in_features: int,
        activation_bits: int | None,
    ) -> None:
        super().__init__()
        self.packed = nn.Buffer(packed)
        self.scale = nn.Buffer(scale)
        self.bias = nn.Buffer(bias) if bias is not None else None
        self.in_features = in_features
        self.activation_bits = activation_bits

    @classmethod
    def empty(cls, facts: artefacts.Facts) -> TernaryLinear:
        """Return the module that `facts` describe, without values (on meta)."""
        out_features, in_features = facts["out_features"], facts["in_features"]
        with torch.device("meta"):
            return cls(
                torch.empty(out_features, packed_bytes(in_features), dtype=torch.uint8),
                torch.empty(1),
                torch.empty(out_features) if facts["bias"] is not None else None,
                in_features,
                facts["activation_bits"],
            )

    def facts(self) -> artefacts.Facts:
        """Return the JSON facts from which `empty` builds this module again."""
        return {
            "out_features": self.packed.shape[0],
            "in_features": self.in_features,
            "bias": dtype_name(self.bias),
            "activation_bits": self.activation_bits,
        }

    def prepare(self, name: str, hardware: Hardware) -> None:
        """Bring the bias to float32.

        Raises:
            ValueError: a byte stands for no five ternary values.
        """
        if self.packed.numel() and int(self.packed.max()) >= BYTES_USED:
            raise ValueError(f"{name} holds bytes above {BYTES_USED - 1}: not packed ternary")
        if self.bias is not None:
            self.bias = nn.Buffer(self.bias.float())

    def use(self, name: str) -> KernelUse:
        """Return what runs the layer called `name`."""
        rounding = "" if self.activation_bits is None else "INT8 per token, then "
        return KernelUse(
            name=name,
            layer=type(self).__name__,
            kernel=f"{rounding}ternary unpacked + torch.matmul in float32",
            execution="dequantized",
            weights=self.packed.shape[0] * self.in_features,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Round each token of `x`, multiply by the ternary weights, scale, add the bias."""
        tokens = x.float() if self.activation_bits is None else round_tokens(x)
        values = unpack(self.packed, self.in_features).float()
        y = functional.linear(tokens, values).mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


@dataclass(frozen=True)
class BitNet:
    """Ternary weights with one scale a matrix.

    Attributes:
        activation_bits: 8, as the paper has it; None leaves activations as they are.
        keep: patterns of module names that stay as they are.
    """

    name: str
    activation_bits: int | None = 8
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.activation_bits not in (8, None):
            raise ConfigError(
                f"method.activation_bits of bitnet is {self.activation_bits}; it must be 8, or "
                "null to leave activations as they are"
            )
        object.__setattr__(self, "keep", names(self.keep))

    @property
    def bits(self) -> float:
        """log2(3): what three values need."""
        return BITS

    @property
    def group_size(self) -> None:
        """One scale serves the whole matrix."""
        return None

    def check(self, hardware: Hardware) -> None:
        """Refuse FP16 activations on a CPU."""
        refuse_emulated(hardware)

    def stored_bits(self, matrix: Matrix) -> int:
        """Eight bits for five weights of a row, the last byte filled up, and 32 of the scale."""
        return 8 * matrix.out_features * packed_bytes(matrix.in_features) + 32

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out."""
        selection = select_linears(model, Scope(keep=names(self.keep)), STACKED_EXPERTS)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Round the weights and write them packed; activations are rounded when it runs."""
        matrices, left_out = self.select(model)
        layers: dict[str, artefacts.Facts] = {}
        for matrix in matrices:
            weight = weight_of(model, matrix)
            check_finite(matrix.name, weight)
            values, scale = ternary(weight)
            bias = stored_bias(model, matrix)
            linear = TernaryLinear(
                pack(values), scale, bias, matrix.in_features, self.activation_bits
            )
            layers[matrix.name] = linear.facts()
            replace(model, matrix, linear)
        artefacts.save(model, into, layers)
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, bits, left_out, [POST_TRAINING])

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with weights that are unpacked at each call."""
        self.check(hardware)
        return load_engine(artefact, hardware, TernaryLinear.empty)
