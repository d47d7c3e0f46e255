"""INT8 through ONNX Runtime, activations rounded as they come: `quantize_dynamic`.

Weights are INT8 (symmetric) or UINT8, one scale a row or one a matrix. At each call ONNX Runtime
takes the range of the whole input (all tokens of all sequences: a token's result depends on those
beside it), rounds to UINT8 and multiplies integers: `DynamicQuantizeMatMul`, or where several
matrices share an input `DynamicQuantizeLinear` and `MatMulIntegerToFloat`.

Without VNNI these kernels add products in 16 bits, which can saturate; `reduce_range` stores seven
bits and cannot. What both INT8 methods share is here, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods import onnx_graph
from methods.base import Engine, Execution, Hardware, KernelUse, Matrix, QuantizeReport
from methods.encoder_engine import engine_of
from methods.layers import Scope
from methods.library import check_covered
from methods.onnx_engine import check_hardware, load_engine
from methods.onnx_export import copy_facts, export, float32_notes, select_finite, select_maps
from methods.onnx_graph import MODEL, WEIGHT, plain_model, read, require_onnx, tensors_of
from methods.options import names, require_flags

QUANTIZED = "_quantized"
LARGEST = 255.0
INTEGER_OPERATORS = (
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "QLinearMatMul",
)

PATH_TOLERANCE = 0.2
"""For `methods.packed.compare_paths`: both paths round activations to the same grids, and the order
of float sums makes 6e-7. But a last bit tips a rounding now and then, and each tip costs a whole
step of 8 bits, as when the plain path is compared with itself, one bit of its embedding changed:
in a small model up to 0.07. Rows in another order give 1 and more."""


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of UINT8 activations."""

    scale: float
    zero_point: int

    def round(self, x: Tensor) -> Tensor:
        """Return float32 `x` on the grid, same shape, as ONNX's QuantizeLinear rounds."""
        q = (x / self.scale).round() + self.zero_point
        return (q.clamp(0, LARGEST) - self.zero_point) * self.scale


def dynamic_grid(x: Tensor) -> Grid:
    """Return the grid that ONNX's DynamicQuantizeLinear gives all of `x`."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / LARGEST or 1.0
    return Grid(scale, round(min(max(-low / scale, 0.0), LARGEST)))


class RoundedLinear(nn.Module):
    """A decoded map between rounded activations: float32 [..., in] -> [..., out].

    Input grid None: taken from each input. Output grid None: the output is not rounded.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, inputs: Grid | None, outputs: Grid | None
    ) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.bias = None if bias is None else nn.Buffer(bias)
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        """Round, multiply in float32, round the product where ONNX Runtime does, add the bias."""
        grid = self.inputs or dynamic_grid(x)
        y = functional.linear(grid.round(x), self.weight)
        if self.outputs is not None:
            y = self.outputs.round(y)
        return y if self.bias is None else y + self.bias


def has_exact_sums() -> bool:
    """Whether this processor adds products of 8-bit integers in 32 bits (VNNI)."""
    return bool(torch.cpu._is_vnni_supported())


def quantized_maps(folder: Path) -> list[str]:
    """Return the maps whose weights the graph in `folder` stores as integers."""
    suffix = f"{WEIGHT}{QUANTIZED}"
    stored = onnx_graph.tensor_bytes(folder)
    return [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]


def decode(stored: dict[str, Tensor], name: str) -> Tensor:
    """Return the float32 weight [out, in] of map `name` from its stored integers.

    weight = scale * (q - zero_point), with q [in, out] and scale and zero point [out] or [].
    """
    base = f"{name}{WEIGHT}"
    q, scale, zero = (stored[f"{base}{end}"] for end in (QUANTIZED, "_scale", "_zero_point"))
    return (scale * (q.int() - zero.int())).T.contiguous()


def plain_engine(
    artefact: Path, stored: dict[str, Tensor], grids: Mapping[str, tuple[Grid | None, Grid | None]]
) -> Engine:
    """Return a transformers model of the artefact with `RoundedLinear`s where it has integers."""
    modules = {
        name: RoundedLinear(decode(stored, name), onnx_graph.bias_of(stored, name), *own)
        for name, own in grids.items()
    }
    model = plain_model(artefact, stored, dict(modules))
    kernel = "decoded once, activations rounded + torch.nn.functional.linear"
    uses = [
        KernelUse(name, "RoundedLinear", kernel, "dequantized", module.weight.numel())
        for name, module in modules.items()
    ]
    return engine_of(model, "cpu", uses)


def describe_integers(operator: str, activations: str, reduced: bool) -> tuple[str, Execution]:
    """Return kernel and execution of a matrix that `operator` ran, `activations` said in words."""
    if operator not in INTEGER_OPERATORS:
        return f"onnxruntime DequantizeLinear + {operator}, float32", "dequantized"
    sums = "" if has_exact_sums() or reduced else ", 16-bit sums that can saturate (no VNNI)"
    return f"onnxruntime {operator}, 8-bit integers, activations rounded to {activations}{sums}", (
        "packed"
    )


class IntegerMaps:
    """What the methods with INT8 weights share: scope, widths, and where they run."""

    name: str
    per_channel: bool
    head: bool
    keep: Sequence[str]

    # A graph computes in float32, in which everything else is stored.
    rest_dtype: ClassVar[str] = "float32"

    @property
    def bits(self) -> float:
        """INT8, though `reduce_range` uses seven of them."""
        return 8.0

    @property
    def group_size(self) -> int | None:
        """-1 with a scale a row; None where one scale serves the whole matrix."""
        return -1 if self.per_channel else None

    @property
    def _scope(self) -> Scope:
        return Scope(self.head, False, names(self.keep))

    def check(self, hardware: Hardware) -> None:
        """Refuse what the integer operators cannot run on."""
        check_hardware(self.name, hardware)

    def stored_bits(self, matrix: Matrix) -> int:
        """8 bits a weight; 32 for a scale and 8 for a zero point, of each row or the matrix.

        Calibrated grids of activations, 40 bits each, belong to tensors that matrices share.
        """
        return 8 * matrix.weights + 40 * (matrix.out_features if self.per_channel else 1)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out."""
        selection = select_maps(model, self._scope, self.name)
        return selection.matrices, selection.left_out


@dataclass(frozen=True)
class OnnxInt8Dynamic(IntegerMaps):
    """INT8 weights; activations rounded to UINT8 on the range of each call.

    Attributes:
        per_channel: one scale a row; false: one a matrix.
        symmetric: INT8 around zero; false: UINT8 with a zero point that fits both ends.
        reduce_range: seven bits instead of eight, for processors without VNNI.
        head, keep: scope, as for every method.
    """

    name: str
    per_channel: bool = True
    symmetric: bool = True
    reduce_range: bool = False
    head: bool = False
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = False
    encoders: ClassVar[bool] = True
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        flags = ("per_channel", "symmetric", "reduce_range", "head")
        require_flags(self.name, {field: getattr(self, field) for field in flags})
        object.__setattr__(self, "keep", names(self.keep))

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Export and quantize; raises ConfigError where a value is not finite."""
        require_onnx(self.name)
        selection = select_finite(model, self._scope, self.name)
        matrices = selection.matrices
        with TemporaryDirectory(dir=into) as folder:
            notes = export(model, matrices, Path(folder))
            self._quantize_graph(Path(folder), matrices, into)
            copy_facts(Path(folder), into)
        check_covered("onnxruntime", matrices, quantized_maps(into))
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, bits, selection.left_out, notes + float32_notes(model))

    def _quantize_graph(self, source: Path, matrices: list[Matrix], into: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            source / MODEL,
            into / MODEL,
            op_types_to_quantize=["MatMul"],
            per_channel=self.per_channel,
            reduce_range=self.reduce_range,
            weight_type=QuantType.QInt8 if self.symmetric else QuantType.QUInt8,
            nodes_to_quantize=[matrix.name for matrix in matrices],
            use_external_data_format=True,
        )

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the graph into ONNX Runtime."""
        self.check(hardware)
        engine = load_engine(artefact, hardware, self._describe, self.name)
        engine.couples_rows = True
        return engine

    def _describe(self, operator: str) -> tuple[str, Execution]:
        return describe_integers(operator, "u8 on the range of each call", self.reduce_range)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the stored weights, decoded, into a transformers model that rounds activations."""
        self.check(hardware)
        require_onnx(self.name)
        stored = tensors_of(read(artefact))
        return plain_engine(artefact, stored, dict.fromkeys(quantized_maps(artefact), (None, None)))
