"""EETQ: INT8 weights with a scale a row, floating activations (W8A16), through EETQ's own kernel.

The library (NetEase-FuXi/EETQ) needs CUDA and is built from source. Where both are there, its
kernel runs the artefact: `simulated` otherwise, the same numbers stored as floats and multiplied as
such, which says what EETQ costs in quality and nothing of its speed, memory or size.

Conventions, read from the library's source (`symmetric_quantize` in
csrc/cutlass_kernels/cutlass_preprocessors.cc, which is FasterTransformer's):

- scale = max|w| / 128 of a row, stored as float16; so the largest weight itself becomes 127 where
  it is positive. The code is found with the scale before it is stored.
- code = clamp(round(w / scale), -128, 127), where round takes ties away from zero, as C does.

`quantize` follows that on any machine; the library's own `quant_weights` is not called.

Stored are the names and shapes of the library's layer: `weight` int8 [in, out], `weight_scales`
float16 [out], `bias`. The kernel wants the bytes of `weight` interleaved as the card's generation
has it; that is done when it is loaded (`preprocess_weights`), so that one artefact serves every
card. Checkpoints that transformers writes with EetqConfig hold the interleaved bytes instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import artefact as artefacts
from methods.artefact import dtype_name, stored_bias
from methods.base import Engine, Hardware, KernelUse, Matrix, QuantizeReport
from methods.engine import TorchEngine
from methods.layers import Scope, check_finite, replace, select_linears, weight_of
from methods.library import put_linear, uses_of, whole_maps_only
from methods.options import names, refuse_emulated

LIBRARY = "EETQ"
KERNEL = "EETQ::w8_a16_gemm, float16"
SIMULATED = "none: rounded weights as floats, torch.nn.functional.linear"
WHERE_IT_RUNS = (
    "EETQ's kernel runs on CUDA where the library is installed (github.com/NetEase-FuXi/EETQ, "
    "built from source); elsewhere its numbers are simulated in floating point"
)


def has_library() -> bool:
    """Whether the library's compiled module can be imported."""
    return find_spec(LIBRARY) is not None


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round floating weight [out, in] as EETQ does: int8 [in, out] and float16 scales [out].

    Raises:
        ValueError: a scale is beyond float16.
    """
    scale = weight.float().abs().amax(1) / 128
    # A row of zeros has no scale; the library divides by zero there, and stores what C makes of it.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    stored = scale.half()
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"a scale of {float(scale.max()):.4g} is beyond float16")
    quotient = (weight.float() / scale[:, None]).double()
    codes = torch.trunc(quotient + torch.copysign(torch.tensor(0.5), quotient))
    return codes.clamp_(-128, 127).to(torch.int8).T.contiguous(), stored


class StoredEetq(nn.Module):
    """A linear map as it lies in the artefact: int8 weight [in, out], weight_scales [out], bias."""

    def __init__(self, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.weight_scales = nn.Buffer(weight_scales)
        self.bias = nn.Buffer(bias) if bias is not None else None

    @classmethod
    def empty(cls, facts: artefacts.Facts) -> StoredEetq:
        """Return the module that `facts` describe, without values (on meta)."""
        out_features, in_features = facts["out_features"], facts["in_features"]
        with torch.device("meta"):
            return cls(
                torch.empty(in_features, out_features, dtype=torch.int8),
                torch.empty(out_features, dtype=torch.float16),
                torch.empty(out_features) if facts["bias"] is not None else None,
            )

    @property
    def matrix(self) -> tuple[int, int]:
        """Outputs and inputs."""
        in_features, out_features = self.weight.shape
        return out_features, in_features

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] that the codes stand for, in `dtype`."""
        return (self.weight.T.float() * self.weight_scales.float()[:, None]).to(dtype)


class EetqLinear(nn.Module):
    """The library's kernel on a stored linear map: float16 [..., in] -> [..., out], on CUDA."""

    def __init__(self, stored: StoredEetq) -> None:
        super().__init__()
        import EETQ

        self.gemm = EETQ.w8_a16_gemm
        # It rearranges the bytes on the CPU, as the card it finds wants them.
        arranged = EETQ.preprocess_weights(stored.weight.cpu(), False)
        self.weight = nn.Buffer(arranged.to(stored.weight.device))
        self.weight_scales = nn.Buffer(stored.weight_scales)
        self.bias = nn.Buffer(stored.bias.half()) if stored.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight and add the bias."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y: Tensor = self.gemm(rows, self.weight, self.weight_scales)
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Eetq:
    """INT8 weights with a scale a row.

    Attributes:
        keep: patterns of module names that stay as they are.
    """

    name: str
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", names(self.keep))

    @property
    def bits(self) -> float:
        """INT8."""
        return 8.0

    @property
    def group_size(self) -> int:
        """One scale a row."""
        return -1

    def check(self, hardware: Hardware) -> None:
        """Refuse what EETQ's kernel does not compute, and simulating where that is not allowed."""
        refuse_emulated(hardware)
        if hardware.device != "cuda":
            if not hardware.allow_fallback:
                raise ConfigError(
                    f"eetq: its kernel needs CUDA, on {hardware.device} its numbers are simulated, "
                    "and hardware.allow_fallback is false; set hardware.allow_fallback=true"
                )
        elif has_library() and hardware.compute_dtype != "float16":
            raise ConfigError(
                f"eetq: its kernel computes in float16, not in {hardware.compute_dtype}; "
                "set hardware.compute_dtype=float16"
            )

    def stored_bits(self, matrix: Matrix) -> int:
        """8 bits a weight, 16 a row's scale."""
        return 8 * matrix.weights + 16 * matrix.out_features

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out."""
        selection = select_linears(model, Scope(keep=names(self.keep)), whole_maps_only("EETQ"))
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Round the weights and write them as EETQ's integers.

        Raises:
            ConfigError: a weight is not finite, or a scale does not fit float16.
        """
        matrices, left_out = self.select(model)
        layers: dict[str, artefacts.Facts] = {}
        notes, lost = [WHERE_IT_RUNS], 0
        for matrix in matrices:
            weight = weight_of(model, matrix)
            check_finite(matrix.name, weight)
            try:
                codes, scales = round_rows(weight)
            except ValueError as error:
                raise ConfigError(
                    f"weight {matrix.name}: {error}, the only type EETQ has for scales; "
                    "spare it with method.keep"
                ) from error
            lost += int((scales == 0).sum())
            bias = stored_bias(model, matrix)
            layers[matrix.name] = {
                "out_features": matrix.out_features,
                "in_features": matrix.in_features,
                "bias": dtype_name(bias),
            }
            replace(model, matrix, StoredEetq(codes, scales, bias))
        artefacts.save(model, into, layers)
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        if lost:
            notes.append(f"{lost} rows are so small that float16 holds their scale as 0: all lost")
        return QuantizeReport(matrices, bits, left_out, notes)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load for EETQ's kernel where it runs, else with rounded weights as floats.

        Raises:
            ConfigError: see `check`; or CUDA without the library, and no fallback allowed.
        """
        self.check(hardware)
        dtype = getattr(torch, hardware.compute_dtype)
        model = artefacts.load(
            artefact, lambda name, facts: StoredEetq.empty(facts), dtype, hardware.device
        )
        kernel = hardware.device == "cuda" and has_library()
        if not kernel and not hardware.allow_fallback:
            raise ConfigError(
                "eetq: the library EETQ is not installed here and hardware.allow_fallback is "
                "false; install it from github.com/NetEase-FuXi/EETQ"
            )
        uses: list[KernelUse] = []
        for name, stored in list(model.named_modules()):
            if not isinstance(stored, StoredEetq):
                continue
            matrix = Matrix(name, "block", *stored.matrix)
            if kernel:
                model.set_submodule(name, EetqLinear(stored))
                uses += uses_of(model, [matrix], KERNEL, "packed")
                continue
            bias = None if stored.bias is None else stored.bias.to(dtype)
            put_linear(model, matrix, stored.dequantized(dtype), bias)
            uses += uses_of(model, [matrix], SIMULATED, "simulated")
        return TorchEngine(model, hardware.device, uses)
