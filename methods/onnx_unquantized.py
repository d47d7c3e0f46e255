"""FP32 and FP16 through ONNX Runtime: the unquantized model as an ONNX graph.

FP16 here is how weights are stored. ONNX Runtime has no FP16 product on x86: when it loads the
graph it converts every weight to FP32, once, and multiplies in FP32 from then on (seen in profiles:
no conversion is run, with constant folding or without). So memory and speed are those of FP32:
state `dequantized`. Only the embedding stays FP16 in memory, its rows converted as they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import onnx_graph
from methods.base import Engine, Execution, Hardware, Matrix, QuantizeReport
from methods.encoder_engine import engine_of
from methods.layers import Scope, check_finite
from methods.library import uses_of
from methods.onnx_engine import check_hardware, load_engine
from methods.onnx_export import copy_facts, export, select_maps
from methods.onnx_graph import plain_model, read, require_onnx, tensors_of

DTYPES = {"float32": torch.float32, "float16": torch.float16}
DECODED = "decoded once + torch.nn.functional.linear"

PATH_TOLERANCE = 1e-3
"""For `methods.packed.compare_paths`: the same float32 weights in another order of sums, 1e-6 seen.
A wrong position, mask or weight gives 0.1 and more."""


@dataclass(frozen=True)
class OnnxUnquantized:
    """The model as it is, in an ONNX graph with weights of type `dtype`."""

    name: str
    dtype: str

    needs_calibration: ClassVar[bool] = False
    encoders: ClassVar[bool] = True
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"method.dtype of {self.name} is {self.dtype!r}; it must be {' or '.join(DTYPES)}"
            )

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
        """Refuse what ONNX Runtime cannot compute in."""
        check_hardware(self.name, hardware, cuda=True)

    def stored_bits(self, matrix: Matrix) -> int:
        """One value of the type a weight."""
        return matrix.weights * 8 * DTYPES[self.dtype].itemsize

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the matrices a quantizing method would cover, so that rows compare."""
        selection = select_maps(model, Scope(), self.name)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Export the model; raises ConfigError where a weight does not fit the type."""
        require_onnx(self.name)
        matrices, left_out = self.select(model)
        parameters = set()
        for name, parameter in model.named_parameters():
            check_finite(name, parameter)
            if not bool(torch.isfinite(parameter.to(DTYPES[self.dtype])).all()):
                raise ConfigError(
                    f"weight {name} overflows in {self.dtype}; use onnx_fp32 for this model"
                )
            parameters.add(name)
        if self.dtype == "float32":
            notes = export(model, matrices, into)
        else:
            with TemporaryDirectory(dir=into) as folder:
                notes = export(model, matrices, Path(folder))
                graph = read(Path(folder))
                (Path(folder) / onnx_graph.MODEL).unlink()
                _store_as_float16(graph, parameters)
                copy_facts(Path(folder), into)
            onnx_graph.write(graph, into)
        stored = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, stored, left_out, notes, unquantized=self.dtype)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the graph into ONNX Runtime."""
        self.check(hardware)
        engine = load_engine(artefact, hardware, self._describe, self.name)
        engine.reads_stored = self.dtype == "float32"
        return engine

    def _describe(self, operator: str) -> tuple[str, Execution]:
        if self.dtype == "float32":
            return f"onnxruntime {operator}, float32", "packed"
        return f"onnxruntime {operator}, float32 (converted from float16 on loading)", "dequantized"

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the stored weights into a plain transformers model, to compare with."""
        self.check(hardware)
        require_onnx(self.name)
        model = plain_model(artefact, tensors_of(read(artefact)), {})
        facts = onnx_graph.read_facts(artefact)
        matrices = [facts.matrix(name) for name in facts.matrices]
        uses = uses_of(model, matrices, DECODED, "dequantized")
        return engine_of(model, "cpu", uses)


def _store_as_float16(graph: Any, parameters: set[str]) -> None:
    """Store the tensors called `parameters` as float16, converted where the graph uses them.

    Rows of a table are converted after they are looked up, so that the table can stay float16.
    """
    import numpy
    import onnx

    narrow = set()
    for tensor in graph.graph.initializer:
        if tensor.name in parameters:
            values = onnx.numpy_helper.to_array(tensor).astype(numpy.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            narrow.add(tensor.name)
    nodes, wide = [], {}
    for node in graph.graph.node:
        if node.op_type == "Gather" and node.input[0] in narrow:
            result = node.output[0]
            node.output[0] = f"{result}_float16"
            nodes += [node, onnx.helper.make_node("Cast", [node.output[0]], [result], to=1)]
            continue
        for place, name in enumerate(node.input):
            if name not in narrow:
                continue
            if name not in wide:
                wide[name] = f"{name}_float32"
                nodes.append(onnx.helper.make_node("Cast", [name], [wide[name]], to=1))
            node.input[place] = wide[name]
        nodes.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
