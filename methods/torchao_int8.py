"""torchao's INT8: weights only, or weights and activations, one symmetric scale a row.

The schemes of its `Int8WeightOnlyConfig` and `Int8DynamicActivationInt8WeightConfig`. Weights:
scale = max|row| / 127.5, q in -128..127 (torchao 0.18, `choose_qparams_affine`). Dynamic
activations have the same grid, a scale a token. What runs, seen by profiling torchao 0.18 in eager
mode:

- weight only: `weight.to(type of x)` and `aten::mm` at every call, then the scale. No INT8 kernel
  runs, on a CPU as on CUDA, so it is slower than the float model, and the rows say `dequantized`.
  (`aten::_weight_int8pack_mm` comes in with torch.compile only; `method=rtn bits=8` calls it.)
- dynamic: `aten::_int_mm`. On a CPU oneDNN's integer GEMM, u8 x s8 where the processor has VNNI but
  no AMX, with the sums of the weights taken off, again computed at each call. Without VNNI its
  16-bit sums could saturate, so such processors are refused. On CUDA cuBLAS, and the rows are
  filled up to what it takes (`methods.int8_dynamic_layers.TorchaoLinear`).

The artefact is a checkpoint of transformers' `TorchAoConfig` (`methods/torchao_engine.py`), which
knows `nn.Linear` only: GPT-2's transposed Conv1D is refused, stacks of experts are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kernels.errors import ConfigError
from methods.artefact import checkpoint_dtype
from methods.base import Engine, Execution, Hardware, Matrix, QuantizeReport
from methods.compressed_layers import Int8Linear
from methods.engine import TorchEngine
from methods.int8_dynamic_layers import INT_MM_MULTIPLE, StoredLinear, TorchaoLinear
from methods.int8_linear import DEQUANTIZED, PATH_TOLERANCE, untie
from methods.int8_static import has_integer_kernel
from methods.layers import (
    Scope,
    Selection,
    bias_of,
    check_finite,
    replace,
    select_linears,
    weight_of,
)
from methods.library import put_linear, require, uses_of, whole_maps_only
from methods.options import names, require_flags
from methods.torchao_engine import (
    PACKAGE,
    check_activations,
    check_dtype,
    load_folder,
    quantize,
    stored_matrices,
    stored_tensors,
    write_folder,
)

Activations = Literal["none", "dynamic"]

KERNELS: dict[str, tuple[str, Execution]] = {
    "none": ("torchao Int8Tensor: weight to {dtype} + aten::mm", "dequantized"),
    "dynamic": ("torchao Int8Tensor: aten::_int_mm (activations int8, per token)", "packed"),
}


@dataclass(frozen=True)
class TorchaoInt8:
    """torchao's INT8 weights, with float or dynamic INT8 activations.

    Attributes:
        activations: `none` keeps them in the hardware's type; `dynamic` rounds each token to INT8.
        head, keep: scope, as for every method.
    """

    name: str
    activations: str = "none"
    head: bool = False
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = False
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        check_activations(self.activations)
        require_flags(self.name, {"head": self.head})
        object.__setattr__(self, "keep", names(self.keep))

    @property
    def bits(self) -> float:
        """INT8."""
        return 8.0

    @property
    def group_size(self) -> int:
        """One scale a row."""
        return -1

    @property
    def _scope(self) -> Scope:
        return Scope(self.head, False, names(self.keep))

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError where the integer kernel cannot run, or the type is emulated."""
        check_dtype(self.name, hardware)
        if self.activations == "dynamic" and hardware.device == "cpu" and not has_integer_kernel():
            raise ConfigError(
                f"this processor has no VNNI instructions, without which the integer sums of "
                f"{self.name} with activations=dynamic can overflow; set method.activations=none"
            )

    def stored_bits(self, matrix: Matrix) -> int:
        """8 bits a weight, 32 a row's scale, 8 its zero point (0, but stored)."""
        return 8 * matrix.weights + (32 + 8) * matrix.out_features

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out.

        Raises:
            ConfigError: one is a transposed Conv1D (GPT-2).
        """
        selection = self._selection(model)
        return selection.matrices, selection.left_out

    def _selection(self, model: nn.Module) -> Selection:
        selection = select_linears(model, self._scope, whole_maps_only(PACKAGE))
        for matrix in selection.matrices:
            if isinstance(model.get_submodule(matrix.name), Conv1D):
                raise ConfigError(
                    f"{matrix.name} is a transposed Conv1D, which torchao's checkpoints have no "
                    "form for; use method=int8_dynamic or method=torchao_int4"
                )
        return selection

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Let torchao quantize `model`, in its checkpoint's own type, and write the checkpoint."""
        require(PACKAGE, self.name)
        selection = self._selection(model)
        notes = untie(model, self._scope)
        model.to(checkpoint_dtype(model))
        for matrix in selection.matrices:
            check_finite(matrix.name, weight_of(model, matrix))
        config = self._config()
        quantize(self.name, model, selection.matrices, config)
        write_folder(model, config, into)
        bits = sum(self.stored_bits(matrix) for matrix in selection.matrices)
        return QuantizeReport(selection.matrices, bits, selection.left_out, notes)

    def _config(self) -> Any:
        from torchao import quantization

        build: Any = (
            quantization.Int8WeightOnlyConfig
            if self.activations == "none"
            else quantization.Int8DynamicActivationInt8WeightConfig
        )
        # Inductor's settings are global, and nothing is compiled here.
        return build(set_inductor_config=False)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the checkpoint as transformers does; torchao's tensors run it."""
        self.check(hardware)
        model, matrices = self._model(artefact, hardware)
        if self.activations == "dynamic" and hardware.device == "cuda":
            _fill_up_rows(model, matrices, getattr(torch, hardware.compute_dtype))
        kernel, execution = KERNELS[self.activations]
        uses = uses_of(model, matrices, kernel.format(dtype=hardware.compute_dtype), execution)
        return TorchEngine(model, hardware.device, uses)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with weights decoded here, from the stored tensors, and multiplied in floats."""
        self.check(hardware)
        model, matrices = self._model(artefact, hardware)
        for matrix in matrices:
            qdata, scale, zero_point = stored_tensors(artefact, matrix.name)
            bias = bias_of(model, matrix)
            if self.activations == "none":
                weight = (qdata.float() - zero_point) * scale
                dtype = getattr(torch, hardware.compute_dtype)
                put_linear(model, matrix, weight.to(hardware.device, dtype), bias)
                continue
            if bool(zero_point.any()):
                raise ValueError(
                    f"{matrix.name}: symmetric weights have zero points that are not 0"
                )
            linear = Int8Linear(qdata, scale, None, bias).to(hardware.device)
            linear.dequantized = True
            replace(model, matrix, linear)
        kernel = "aten::linear" if self.activations == "none" else DEQUANTIZED
        return TorchEngine(model, hardware.device, uses_of(model, matrices, kernel, "dequantized"))

    def _model(self, artefact: Path, hardware: Hardware) -> tuple[Any, list[Matrix]]:
        """Return the loaded model and the matrices that the artefact stores quantized."""
        matrices = [
            Matrix(name, "block", *stored_tensors(artefact, name)[0].shape)
            for name in stored_matrices(artefact)
        ]
        return load_folder(self.name, artefact, hardware, matrices), matrices


def _fill_up_rows(model: nn.Module, matrices: Sequence[Matrix], dtype: torch.dtype) -> None:
    """Replace linear maps by ones that give cuBLAS the rows it wants; torchao falls back silently.

    Raises:
        ConfigError: a width is one that cuBLAS does not take.
    """
    for matrix in matrices:
        if any(size % INT_MM_MULTIPLE for size in (matrix.out_features, matrix.in_features)):
            raise ConfigError(
                f"{matrix.name} is {matrix.out_features} x {matrix.in_features}; torch._int_mm on "
                f"CUDA needs multiples of {INT_MM_MULTIPLE}: spare it with method.keep"
            )
        weight = cast(Any, model.get_submodule(matrix.name)).weight
        stored = StoredLinear(
            weight.qdata, weight.scale[:, 0], weight.zero_point[:, 0].int(), bias_of(model, matrix)
        )
        replace(model, matrix, TorchaoLinear(stored, dtype))
