"""INT4 weights in groups through ONNX Runtime: `MatMulNBits`.

Each matrix is one operator with its weights as [out, groups, group / 2] bytes (the first of two
weights in the low half), float32 scales [out, groups] and, unless symmetric, a zero point a group:
of four bits, two in a byte and rows filled up to whole bytes, or from `hqq` a float32. weight =
scale * (q - zero_point), 8 where none is stored. A row that the group does not divide is filled up.

`accuracy_level` is what the operator may compute in: 4 rounds activations to INT8 in blocks as long
as the group; all others are float32 on a CPU. For the real-valued zero points of `hqq` there is no
packed kernel: ONNX Runtime converts the matrix at each call.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import onnx_graph
from methods.base import Engine, Execution, Hardware, Matrix, QuantizeReport
from methods.engine import TorchEngine
from methods.layers import Scope
from methods.library import check_covered, uses_of
from methods.onnx_engine import check_hardware, load_engine
from methods.onnx_export import copy_facts, export, float32_notes, select_finite, select_maps
from methods.onnx_graph import MODEL, matrix_of, plain_model, read, require_onnx, tensors_of
from methods.onnx_unquantized import DECODED
from methods.options import names, require_flags

BITS = 4
GROUP_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
INT8_ACTIVATIONS = 4
OPERATOR = "MatMulNBits"
MIDDLE = 8
Algorithm = Literal["rtn", "hqq"]

PATH_TOLERANCE = 0.1
"""For `methods.packed.compare_paths`: 2e-7 with float32 activations, 0.004 to 0.02 with INT8 ones,
which the plain path does not round. Halves of bytes in the wrong order give 1 and more."""


@dataclass(frozen=True)
class OnnxInt4:
    """INT4 weights, one scale a group.

    Attributes:
        group_size: weights of a row that share a scale: 16, 32, 64, 128 or 256.
        symmetric: levels -8 to 7 around zero; false: a zero point a group.
        algorithm: rtn: ends of the range; hqq: zero points fitted, real numbers.
        accuracy_level: of MatMulNBits, 0 to 4; 4: activations in INT8 blocks, others: float32.
        head, keep: scope, as for every method.
    """

    name: str
    group_size: int
    symmetric: bool = False
    algorithm: Algorithm = "rtn"
    accuracy_level: int = INT8_ACTIVATIONS
    head: bool = False
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = False
    path_tolerance: ClassVar[float] = PATH_TOLERANCE
    rest_dtype: ClassVar[str] = "float32"  # of the graph

    def __post_init__(self) -> None:
        for field, values in (
            ("group_size", GROUP_SIZES),
            ("algorithm", get_args(Algorithm)),
            ("accuracy_level", ACCURACY_LEVELS),
        ):
            value = getattr(self, field)
            if value not in values or isinstance(value, bool):
                raise ConfigError(
                    f"{field} of {self.name} is {value!r}; "
                    f"it must be one of {', '.join(str(one) for one in values)}"
                )
        require_flags(self.name, {"symmetric": self.symmetric, "head": self.head})
        if self.algorithm == "hqq" and self.symmetric:
            raise ConfigError(
                f"algorithm hqq of {self.name} fits zero points, which symmetric levels have not; "
                "set method.symmetric=false, or method.algorithm=rtn"
            )
        object.__setattr__(self, "keep", names(self.keep))

    @property
    def bits(self) -> float:
        """INT4."""
        return float(BITS)

    @property
    def _scope(self) -> Scope:
        return Scope(self.head, False, names(self.keep))

    def check(self, hardware: Hardware) -> None:
        """Refuse other types than float32, and where a conversion at each call is not allowed."""
        check_hardware(self.name, hardware)
        if self.algorithm == "hqq" and not hardware.allow_fallback:
            raise ConfigError(
                f"onnxruntime converts matrices of {self.name} with algorithm hqq at each call; "
                "set hardware.allow_fallback=true, or method.algorithm=rtn"
            )

    def stored_bits(self, matrix: Matrix) -> int:
        """Whole groups of 4 bits a weight; 32 a scale; zero points of 4 bits in bytes, or of 32."""
        groups = math.ceil(matrix.in_features / self.group_size)
        row = groups * (BITS * self.group_size + 32)
        if self.algorithm == "hqq":
            row += 32 * groups
        elif not self.symmetric:
            row += 8 * math.ceil(groups / 2)
        return matrix.out_features * row

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out."""
        selection = select_maps(model, self._scope, self.name)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Export and quantize; raises ConfigError where a value is not finite."""
        require_onnx(self.name)
        selection = select_finite(model, self._scope, self.name)
        matrices = selection.matrices
        with TemporaryDirectory(dir=into) as folder:
            notes = export(model, matrices, Path(folder))
            self._quantize_graph(read(Path(folder)), matrices, into)
            copy_facts(Path(folder), into)
        found = [matrix_of(node.input[1]) for node in _products(read(into, with_data=False))]
        check_covered("onnxruntime", matrices, found)
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, bits, selection.left_out, notes + float32_notes(model))

    def _quantize_graph(self, graph: Any, matrices: list[Matrix], into: Path) -> None:
        nbits = _quantizer()
        if self.algorithm == "hqq":
            config = nbits.HQQWeightOnlyQuantConfig(block_size=self.group_size, bits=BITS)
        else:
            config = nbits.DefaultWeightOnlyQuantConfig(
                block_size=self.group_size,
                is_symmetric=self.symmetric,
                accuracy_level=self.accuracy_level,
                bits=BITS,
            )
        wanted = {matrix.name for matrix in matrices}
        products = {node.name for node in graph.graph.node if node.op_type == "MatMul"}
        quantizer = nbits.MatMulNBitsQuantizer(
            graph, nodes_to_exclude=sorted(products - wanted), algo_config=config
        )
        with warnings.catch_warnings():
            # hqq's code takes NumPy's read-only arrays, and does not write to them.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            quantizer.process()
        quantizer.model.save_model_to_file(str(into / MODEL), use_external_data_format=True)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the graph into ONNX Runtime."""
        self.check(hardware)
        return load_engine(artefact, hardware, self._describe, self.name)

    def _describe(self, operator: str) -> tuple[str, Execution]:
        if operator != OPERATOR:
            raise RuntimeError(f"onnxruntime runs {operator} where {self.name} stored {OPERATOR}")
        if self.algorithm == "hqq":
            return f"onnxruntime {OPERATOR}, converted to float32 at each call", "dequantized"
        rounded = self.accuracy_level == INT8_ACTIVATIONS
        activations = "activations rounded to int8 blocks" if rounded else "float32 activations"
        return f"onnxruntime {OPERATOR}, {activations}", "packed"

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the stored weights, decoded here, into a plain transformers model."""
        self.check(hardware)
        require_onnx(self.name)
        graph = read(artefact)
        stored = tensors_of(graph)
        facts = onnx_graph.read_facts(artefact)
        for node in _products(graph):
            name = matrix_of(node.input[1])
            stored[f"{name}.weight"] = decode(
                [stored[one] for one in node.input[1:]], facts.matrix(name).in_features
            ).T
        model = plain_model(artefact, stored, {})
        matrices = [facts.matrix(name) for name in facts.matrices]
        return TorchEngine(model, "cpu", uses_of(model, matrices, DECODED, "dequantized"))


def _quantizer() -> Any:
    """Return ONNX Runtime's module, which when imported makes every logger tell everything."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        nbits = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return nbits


def _products(graph: Any) -> list[Any]:
    return [node for node in graph.graph.node if node.op_type == OPERATOR]


def decode(stored: Sequence[Tensor], in_features: int) -> Tensor:
    """Return the float32 weight [out, in] of MatMulNBits' inputs: bytes, scales, zero points."""
    packed, scales = stored[0], stored[1]
    out_features, groups, half = packed.shape
    codes = torch.stack((packed & 15, packed >> 4), -1).view(out_features, groups, 2 * half)
    zeros = torch.full((out_features, groups), float(MIDDLE))
    if len(stored) > 2 and stored[2].is_floating_point():
        zeros = stored[2].view(out_features, groups)
    elif len(stored) > 2:
        pairs = stored[2].view(out_features, -1)
        zeros = torch.stack((pairs & 15, pairs >> 4), -1).view(out_features, -1)[:, :groups].float()
    weight = (codes.float() - zeros[..., None]) * scales.view(out_features, groups, 1)
    return weight.view(out_features, -1)[:, :in_features]
