"""INT8 through ONNX Runtime, activations on calibrated ranges: `quantize_static`.

The float32 graph reads the calibration text and one of ONNX Runtime's calibrators chooses a range
for each product's input (and output, with `round_outputs`): `min_max`; `percentile` of a histogram
with 2048 bins; `entropy`, which looks for the range whose 128 levels tell most of the histogram.
The histogram has 128 bins too, so `entropy` clips only what later samples add to the first one's
range.

Format `qdq` writes QuantizeLinear and DequantizeLinear around each MatMul, which ONNX Runtime fuses
when it loads the graph: into `MatMulIntegerToFloat` with float outputs, into `QLinearMatMul` with
rounded ones. Format `qoperator` writes `QLinearMatMul` itself. The operators that really ran stand
in the record.

The calibrators keep every value they are shown until a histogram is made; they are given one sample
at a time and only the tensors in question, so the memory is one sample's inputs of all products.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.base import Calibration, Engine, Execution, Hardware, Matrix, QuantizeReport
from methods.library import check_covered
from methods.onnx_encoder import MASK
from methods.onnx_engine import ERRORS_ONLY, FEEDS, KEPT, PROVIDERS, load_engine
from methods.onnx_export import copy_facts, export, float32_notes, select_finite
from methods.onnx_graph import MODEL, WEIGHT, read, require_onnx, tensors_of
from methods.onnx_int8 import (
    PATH_TOLERANCE,
    QUANTIZED,
    Grid,
    IntegerMaps,
    describe_integers,
    plain_engine,
    quantized_maps,
)
from methods.options import names, need_calibration, require_flags

Calibrator = Literal["min_max", "entropy", "percentile"]
Format = Literal["qdq", "qoperator"]


@dataclass(frozen=True)
class OnnxInt8Static(IntegerMaps):
    """INT8 weights; activations rounded to UINT8 on ranges fixed by calibration.

    Attributes:
        calibration: how much of the calibration text is read.
        calibrator: how a range is chosen: min_max, entropy or percentile.
        percentile: of calibrator percentile: per cent of the values that stay inside.
        format: qdq or qoperator (which rounds outputs).
        round_outputs: round each product to UINT8 too, before its bias is added.
        symmetric: activation ranges around zero instead of ones that fit both ends.
        per_channel: one weight scale a row; false: one a matrix.
        reduce_range: seven bits of weights instead of eight, for processors without VNNI.
        head, keep: scope, as for every method.
    """

    name: str
    calibration: Calibration
    calibrator: Calibrator = "min_max"
    percentile: float = 99.99
    format: Format = "qdq"
    round_outputs: bool = False
    symmetric: bool = False
    per_channel: bool = True
    reduce_range: bool = False
    head: bool = False
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = True
    encoders: ClassVar[bool] = True
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        for field, values in (("calibrator", get_args(Calibrator)), ("format", get_args(Format))):
            if getattr(self, field) not in values:
                raise ConfigError(
                    f"method.{field} of {self.name} is {getattr(self, field)!r}; "
                    f"it must be one of {', '.join(values)}"
                )
        if not 50 < self.percentile <= 100:
            raise ConfigError(
                f"method.percentile of {self.name} is {self.percentile}; "
                "it must be above 50 and at most 100"
            )
        flags = ("round_outputs", "symmetric", "per_channel", "reduce_range", "head")
        require_flags(self.name, {field: getattr(self, field) for field in flags})
        if self.format == "qoperator" and not self.round_outputs:
            raise ConfigError(
                f"method.format=qoperator of {self.name} always rounds outputs; "
                "set method.round_outputs=true, or method.format=qdq"
            )
        object.__setattr__(self, "keep", names(self.keep))

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Export, measure ranges on `calibration`, int64 [samples, seq_len], and quantize."""
        require_onnx(self.name)
        calibration = need_calibration(self.name, calibration)
        selection = select_finite(model, self._scope, self.name)
        matrices = selection.matrices
        with TemporaryDirectory(dir=into) as name:
            folder = Path(name)
            notes = export(model, matrices, folder)
            ranges = folder / "ranges.cache"
            self._write_ranges(folder, matrices, calibration, ranges)
            self._quantize_graph(folder, matrices, ranges, into)
            copy_facts(folder, into)
        check_covered("onnxruntime", matrices, quantized_maps(into))
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, bits, selection.left_out, notes + float32_notes(model))

    def _write_ranges(
        self, folder: Path, matrices: list[Matrix], calibration: Tensor, into: Path
    ) -> None:
        """Let the calibrator read the text, one sample at a time, and write the ranges it chose."""
        from onnxruntime.quantization import calibrate

        graph = read(folder, with_data=False).graph
        wanted = self._tensors(graph, {matrix.name for matrix in matrices})
        calibrator = self._calibrator(folder)
        shapes = {one.name: one for one in (*graph.value_info, *graph.input, *graph.output)}
        # Its own choice is all inputs and outputs of all products, the attention's among them.
        calibrator.select_tensors_to_calibrate = lambda model: (wanted, shapes)
        calibrator.augment_graph()
        calibrator.infer_session = _session(folder / "augmented.onnx")
        with redirect_stdout(io.StringIO()):
            for sample in calibration:
                # The head's own inputs, where it is calibrated too; else the last alone will do.
                first = 0 if self.head else len(sample) - 1
                calibrator.collect_data(_OneSample(calibrator.infer_session, sample, first))
            ranges = calibrator.compute_data()
        calibrate.save_tensors_data(ranges, into)

    def _calibrator(self, folder: Path) -> Any:
        from onnxruntime.quantization import calibrate

        kinds = {
            "min_max": calibrate.MinMaxCalibrater,
            "entropy": calibrate.EntropyCalibrater,
            "percentile": calibrate.PercentileCalibrater,
        }
        options = {"percentile": self.percentile} if self.calibrator == "percentile" else {}
        return kinds[self.calibrator](
            folder / MODEL,
            ["MatMul"],
            str(folder / "augmented.onnx"),
            use_external_data_format=True,
            symmetric=self.symmetric,
            **options,
        )

    def _tensors(self, graph: Any, matrices: set[str]) -> set[str]:
        """Return the names of the activations that get a grid."""
        nodes = [node for node in graph.node if node.name in matrices]
        found = {node.input[0] for node in nodes}
        return found | {node.output[0] for node in nodes} if self.round_outputs else found

    def _quantize_graph(
        self, source: Path, matrices: list[Matrix], ranges: Path, into: Path
    ) -> None:
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        methods = {
            "min_max": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }
        quantize_static(
            source / MODEL,
            into / MODEL,
            quant_format=QuantFormat.QDQ if self.format == "qdq" else QuantFormat.QOperator,
            op_types_to_quantize=["MatMul"],
            per_channel=self.per_channel,
            reduce_range=self.reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=[matrix.name for matrix in matrices],
            use_external_data_format=True,
            calibrate_method=methods[self.calibrator],
            calibration_cache_path=ranges,
            extra_options={
                "ActivationSymmetric": self.symmetric,
                "OpTypesToExcludeOutputQuantization": [] if self.round_outputs else ["MatMul"],
            },
        )

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the graph into ONNX Runtime; raises ConfigError where it falls back unallowed."""
        self.check(hardware)
        engine = load_engine(artefact, hardware, self._describe, self.name)
        fallen = [use for use in engine.kernels() if use.execution == "dequantized"]
        if fallen and not hardware.allow_fallback:
            raise ConfigError(
                f"onnxruntime did not fuse {fallen[0].name} of {self.name} into an integer "
                "operator here; set hardware.allow_fallback=true to run its weights as floats"
            )
        return engine

    def _describe(self, operator: str) -> tuple[str, Execution]:
        both = " and outputs" if self.round_outputs else ""
        return describe_integers(operator, f"u8 on calibrated ranges{both}", self.reduce_range)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the stored weights, decoded, into a transformers model that rounds activations."""
        self.check(hardware)
        require_onnx(self.name)
        graph = read(artefact)
        stored = tensors_of(graph)
        return plain_engine(artefact, stored, activation_grids(graph.graph, stored))


class _OneSample:
    """What ONNX Runtime's calibrators read: one sequence, with nothing before it.

    Logits are computed from position `first` on.
    """

    def __init__(self, session: Any, sample: Tensor, first: int) -> None:
        import numpy

        ids = sample[None].numpy()
        kept = torch.arange(first, len(sample)).numpy()
        known = {FEEDS: ids, KEPT: kept, MASK: numpy.ones_like(ids)}
        self._feeds: dict[str, Any] | None = {}
        for one in session.get_inputs():
            if one.name in known:
                self._feeds[one.name] = known[one.name]
            else:
                empty = (1, one.shape[1], 0, one.shape[3])
                self._feeds[one.name] = numpy.zeros(empty, numpy.float32)

    def get_next(self) -> dict[str, Any] | None:
        """Return the inputs, then None."""
        feeds, self._feeds = self._feeds, None
        return feeds


def _session(path: Path) -> Any:
    """Return a session of the calibrator's graph, left as it is, on as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ERRORS_ONLY
    return onnxruntime.InferenceSession(path, options, providers=[PROVIDERS["cpu"]])


def activation_grids(graph: Any, stored: dict[str, Tensor]) -> dict[str, tuple[Grid, Grid | None]]:
    """Return map -> grids of its input and output, as the nodes of a stored `graph` have them."""
    made = {name: node for node in graph.node for name in node.output}
    read_by = {name: node for node in graph.node for name in node.input}
    suffix = f"{WEIGHT}{QUANTIZED}"
    grids: dict[str, tuple[Grid, Grid | None]] = {}
    for node in graph.node:
        if node.op_type == "QLinearMatMul":
            name = node.input[3].removesuffix(suffix)
            grids[name] = _grid(stored, node.input[1:3]), _grid(stored, node.input[6:8])
        elif node.op_type == "DequantizeLinear" and node.input[0].endswith(suffix):
            name = node.input[0].removesuffix(suffix)
            product = read_by[node.output[0]]
            after = read_by.get(product.output[0])
            rounded = after is not None and after.op_type == "QuantizeLinear"
            grids[name] = (
                _grid(stored, made[product.input[0]].input[1:3]),
                _grid(stored, after.input[1:3]) if after and rounded else None,
            )
    return grids


def _grid(stored: dict[str, Tensor], tensors: Sequence[str]) -> Grid:
    scale, zero_point = (stored[name] for name in tensors)
    return Grid(float(scale), int(zero_point))
