"""INT8 with static activations (W8A8): ranges measured once on calibration text, integer kernels.

The float model reads the calibration text once; an observer at each linear map's input chooses the
range of its 8-bit grid (`methods/observers.py`). Stored are int8 weights, symmetric, one scale a
row (`per_channel: false`: one a matrix), and one scale and zero point for the input.

At run time the input is rounded to that fixed grid (uint8; `symmetric: true`: zero_point 128, since
for int8 inputs oneDNN has but its reference loops here, thousands of times slower) and
`onednn::qlinear_pointwise` multiplies integers and returns floats. It is the kernel that torchao's
pt2e and Inductor lower static INT8 to, called here without a compiler. On x86 with VNNI oneDNN runs
it as an integer matrix product (`brg_matmul:avx512_core_vnni` in its own log) with 32-bit sums; all
eight bits of activations are used. Without VNNI its 16-bit sums can saturate, so there the values
are multiplied in float64, slowly: state `dequantized`, and only where fallbacks are allowed.

Unlike `int8_dynamic`, a token's result does not depend on the tokens beside it; but a value beyond
the calibrated range is clipped. These kernels are a CPU's: CUDA is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import artefact as artefacts
from methods.affine import Affine, quantize
from methods.artefact import dtype_name, stored_bias
from methods.base import Calibration, Engine, Hardware, KernelUse, Matrix, QuantizeReport
from methods.encoder_engine import engine_of
from methods.int8_linear import DEQUANTIZED, PATH_TOLERANCE, STACKED_EXPERTS, untie
from methods.layers import Scope, check_finite, replace, select_linears, weight_of
from methods.observers import (
    LEVELS,
    OBSERVERS,
    Grid,
    Observer,
    ObserverName,
    grid_of,
    make_observer,
    named,
    observe_inputs,
)
from methods.options import names, need_calibration, require_flags

KERNEL = "onednn::qlinear_pointwise, u8 x s8"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def has_integer_kernel() -> bool:
    """Whether this processor multiplies 8-bit integers into 32-bit sums (VNNI)."""
    return bool(torch.cpu._is_vnni_supported())


class StaticLinear(nn.Module):
    """A W8A8 linear map with a fixed input grid: float32 or bfloat16 [..., in] -> [..., out].

    Stored: weight int8 [out, in], scale float32 [out] or [1], input_scale float32 [1],
    input_zero_point int32 [1], bias in any float [out]. `prepare` exchanges the plain weight for
    one packed for the kernel. With `dequantized` set the same rounded values are multiplied in
    float64 instead.
    """

    def __init__(self, weight: Tensor, scale: Tensor, grid: Grid, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.scale = nn.Buffer(scale)
        self.input_scale = nn.Buffer(torch.tensor([grid.scale]))
        self.input_zero_point = nn.Buffer(torch.tensor([grid.zero_point], dtype=torch.int32))
        self.bias = nn.Buffer(bias) if bias is not None else None
        self.dequantized = False

    @classmethod
    def empty(cls, facts: artefacts.Facts) -> StaticLinear:
        """Return the module that `facts` describe; its tensors are placeholders."""
        out_features, in_features = facts["out_features"], facts["in_features"]
        with torch.device("meta"):
            return cls(
                torch.empty(out_features, in_features, dtype=torch.int8),
                torch.empty(out_features if facts["per_channel"] else 1),
                Grid(1.0, 0),
                torch.empty(out_features) if facts["bias"] is not None else None,
            )

    def prepare(self) -> None:
        """Pack the weight for the kernel; from now on the plain weight is gone."""
        self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)
        if self.bias is not None:
            self.bias = nn.Buffer(self.bias.float())
        self.weight_zero_points = torch.zeros(self.scale.shape, dtype=torch.int32)
        # Read once: a tensor asked for its value at each call costs more than a small product.
        self.grid = Grid(float(self.input_scale), int(self.input_zero_point))
        self.shift = torch.tensor(float(self.grid.zero_point))

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return `x` on the input's grid: integers 0..255 as float32, same shape."""
        # One pass for two steps: where a matrix is small, each op costs more than its work.
        q = torch.add(self.shift, x.float(), alpha=1 / self.grid.scale)
        return q.round_().clamp_(0, LEVELS - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` to the fixed grid, multiply integers, return x's type."""
        q = self.quantize_input(x)
        if self.dequantized:
            return self._dequantized(q).to(x.dtype)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            q.to(torch.uint8),
            self.grid.scale,
            self.grid.zero_point,
            self.weight,
            self.scale,
            self.weight_zero_points,
            self.bias,
            1.0,
            0,
            x.dtype,
            "none",
            [],
            "",
        )
        return product

    def _dequantized(self, q: Tensor) -> Tensor:
        # The packed weight unpacks as [in, out].
        product = (q - self.grid.zero_point).double() @ self.weight.to_dense().double()
        # As oneDNN has it: the sum as a float32, times the input's scale, times the row's.
        y = product.float() * self.grid.scale * self.scale
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Int8Static:
    """INT8 weights and INT8 activations on ranges fixed by calibration.

    Attributes:
        calibration: how much of the calibration text is read.
        observer: how a range is chosen: one of `methods.observers.OBSERVERS`. `mse` is also what
            PyTorch's own default for x86 (HistogramObserver) minimizes.
        percentile: for observer `percentile`: per cent of the values that each end keeps inside.
        averaging: for observer `moving_average`: weight of each new sample.
        symmetric: activation grids around zero instead of ones that fit both ends of the range.
        per_channel: one weight scale a row; false: one a matrix.
        head, keep: scope, as for every method. Embeddings are looked up, never multiplied.
    """

    name: str
    calibration: Calibration
    observer: ObserverName = "mse"
    percentile: float = 99.99
    averaging: float = 0.01
    symmetric: bool = False
    per_channel: bool = True
    head: bool = False
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = True
    encoders: ClassVar[bool] = True
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ConfigError(
                f"method.observer is {self.observer!r}; it must be one of {', '.join(OBSERVERS)}"
            )
        if not 50 < self.percentile <= 100:
            raise ConfigError(
                f"method.percentile is {self.percentile}; it must be above 50 and at most 100"
            )
        if not 0 < self.averaging <= 1:
            raise ConfigError(
                f"method.averaging is {self.averaging}; it must be above 0 and at most 1"
            )
        flags = {field: getattr(self, field) for field in ("symmetric", "per_channel", "head")}
        require_flags(self.name, flags)
        object.__setattr__(self, "keep", names(self.keep))

    @property
    def bits(self) -> float:
        """INT8."""
        return 8.0

    @property
    def group_size(self) -> int | None:
        """-1 with a scale a row; None where one scale serves the whole matrix."""
        return -1 if self.per_channel else None

    @property
    def _scope(self) -> Scope:
        return Scope(self.head, False, names(self.keep))

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError where the integer kernel cannot run."""
        if hardware.device != "cpu":
            raise ConfigError(
                f"the integer kernels of int8_static are a CPU's, not for {hardware.device}; "
                "there use method=int8_dynamic"
            )
        if hardware.compute_dtype not in DTYPES:
            raise ConfigError(
                f"int8_static computes in {' or '.join(DTYPES)}, not {hardware.compute_dtype}; "
                "set hardware.compute_dtype=float32"
            )
        if not has_integer_kernel() and not hardware.allow_fallback:
            raise ConfigError(
                "this processor has no VNNI instructions for int8_static; with "
                "hardware.allow_fallback=true its weights are converted to float64 at each call"
            )

    def stored_bits(self, matrix: Matrix) -> int:
        """8 bits a weight, 32 a weight scale, 32 + 32 for the input's scale and zero point."""
        return 8 * matrix.weights + 32 * (matrix.out_features if self.per_channel else 1) + 64

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out."""
        selection = select_linears(model, self._scope, STACKED_EXPERTS)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Measure input ranges in float on `calibration`, int64 [samples, seq_len]; then store."""
        calibration = need_calibration("int8_static", calibration)
        matrices, left_out = self.select(model)
        notes = untie(model, self._scope)
        for matrix in matrices:
            check_finite(matrix.name, weight_of(model, matrix))
        observers = {matrix.name: self._new_observer() for matrix in matrices}
        observe_inputs(model, calibration, observers)
        layers: dict[str, artefacts.Facts] = {}
        for matrix in matrices:
            linear = self._quantize_one(model, matrix, observers[matrix.name])
            layers[matrix.name] = {
                "out_features": matrix.out_features,
                "in_features": matrix.in_features,
                "per_channel": self.per_channel,
                "bias": dtype_name(linear.bias),
            }
            replace(model, matrix, linear)
        artefacts.save(model, into, layers)
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, bits, left_out, notes)

    def _new_observer(self) -> Observer:
        return make_observer(self.observer, self.percentile, self.averaging, self.symmetric)

    def _quantize_one(self, model: nn.Module, matrix: Matrix, observer: Observer) -> StaticLinear:
        with named(matrix.name):
            grid = grid_of(*observer.range(), self.symmetric)
        affine = Affine(8, symmetric=True, per_tensor=not self.per_channel, scale_dtype="float32")
        rounded = quantize(matrix.name, weight_of(model, matrix), affine)
        # A code is q + 128, so the upper bit alone tells it from q.
        weight = rounded.codes.bitwise_xor(128).view(torch.int8)
        bias = stored_bias(model, matrix)
        return StaticLinear(weight, rounded.scale.flatten(), grid, bias)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the model and pack its weights for the integer kernel."""
        return self._load(artefact, hardware, dequantized=not has_integer_kernel())

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with the same rounded values multiplied in floating point, to compare with."""
        return self._load(artefact, hardware, dequantized=True)

    def _load(self, artefact: Path, hardware: Hardware, dequantized: bool) -> Engine:
        self.check(hardware)
        model = artefacts.load(artefact, _empty, DTYPES[hardware.compute_dtype])
        uses: list[KernelUse] = []
        for name, module in model.named_modules():
            if not isinstance(module, StaticLinear):
                continue
            weights = module.weight.numel()
            module.prepare()
            module.dequantized = dequantized
            uses.append(
                KernelUse(
                    name,
                    type(module).__name__,
                    DEQUANTIZED if dequantized else KERNEL,
                    "dequantized" if dequantized else "packed",
                    weights,
                )
            )
        return engine_of(model, hardware.device, uses)


def _empty(name: str, facts: artefacts.Facts) -> nn.Module:
    return StaticLinear.empty(facts)
