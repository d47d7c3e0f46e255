"""torchao's INT4: weights only, or with activations rounded to INT8 per token.

- `activations: none`: `PrototypeInt4WeightOnlyConfig`, the scheme of `Int4WeightOnlyConfig` for a
  CPU. Asymmetric, weight = scale * (code - 8) + offset with a floating offset a group ("tinygemm":
  scale = (max - min) / 15, offset = min + 8 * scale; or "hqq", Half-Quadratic Quantization).
  `aten::_weight_int4pack_mm_for_cpu` reads the packed weights. It takes any floating type, but only
  bfloat16 is vectorized: 512 x 256 weights and 512 tokens take 1.6 ms in bfloat16, 122 ms in
  float32. So activations are rounded to bfloat16 around it, and rows say so; where the hardware
  computes in another type and allows no fallback, that is refused. The kernel is a CPU's.
- `activations: dynamic`: `Int8DynamicActivationIntxWeightConfig` with int4 (also called 8da4w).
  Symmetric, weight = scale * (code - 8), scale = max|group| / 7.5. Activations are rounded to an
  asymmetric INT8 grid a token. No kernel for it is in torchao's package for x86 (`da8w4_linear_cpu`
  is not built in): its `IntxUnpackedToInt8Tensor` keeps a weight a byte in memory and converts all
  of them at each call. Rows say `dequantized`.

torchao computes scales in the type of the weights, and stores them in it; models it is used on are
bfloat16. So weights are converted to bfloat16 first.

Neither tensor can be saved without pickles as four bits (transformers stores the second in a byte
a weight, and the layout of the first depends on the processor), so the artefact is this project's
own container: codes two a byte, the first in the low half; scale; offset. torchao's tensors are
built from them again when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from kernels.pack import pack
from methods import artefact as artefacts
from methods.artefact import dtype_name, stored_bias
from methods.base import Engine, Execution, Hardware, KernelUse, Matrix, QuantizeReport
from methods.engine import TorchEngine
from methods.int8_linear import untie
from methods.layers import Scope, Selection, check_finite, replace, select_linears, weight_of
from methods.library import linears_only, require, whole_maps_only
from methods.options import names, require_flags
from methods.packed import PATH_TOLERANCE
from methods.torchao_engine import (
    PACKAGE,
    check_activations,
    check_dtype,
    quantize,
    quantized_weights,
)
from methods.torchao_int4_layers import (
    DTYPE,
    INT4,
    MIDDLE,
    OpaqueLinear,
    RoundedLinear,
    StoredInt4,
    floating_linear,
    opaque_codes,
    unpacked_linear,
)

ALGORITHMS = ("tinygemm", "hqq")
KERNEL_GROUPS = (32, 64, 128)
KERNEL_ROWS = 16


@dataclass(frozen=True)
class TorchaoInt4:
    """torchao's INT4 weights in groups, with float or dynamic INT8 activations.

    Attributes:
        group_size: inputs that share a scale: 32, 64 or 128; with `activations: dynamic` any
            number that divides every width.
        activations: `none` or `dynamic`, see above.
        algorithm: how scales are chosen: `tinygemm` from the ends of the range, `hqq`.
        head, keep: scope, as for every method.
    """

    name: str
    group_size: int
    activations: str = "none"
    algorithm: str = "tinygemm"
    head: bool = False
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = False
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        check_activations(self.activations)
        require_flags(self.name, {"head": self.head})
        object.__setattr__(self, "keep", names(self.keep))
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(
                f"method.algorithm is {self.algorithm!r}; it must be one of {', '.join(ALGORITHMS)}"
            )
        if self.activations == "none" and self.group_size not in KERNEL_GROUPS:
            raise ConfigError(
                f"group_size is {self.group_size}; the packed weights of {self.name} have groups "
                f"of {', '.join(map(str, KERNEL_GROUPS))}"
            )
        if self.group_size < 2:
            raise ConfigError(
                f"group_size is {self.group_size}; {self.name} rounds weights in groups: it must "
                "be 2 or more"
            )

    @property
    def bits(self) -> float:
        """INT4."""
        return 4.0

    @property
    def _scope(self) -> Scope:
        return Scope(self.head, False, names(self.keep))

    @property
    def _has_offset(self) -> bool:
        return self.activations == "none"

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError where no kernel runs these options."""
        if self.activations == "none" and hardware.device != "cpu":
            raise ConfigError(
                f"the packed kernel of {self.name} is a CPU's, not for {hardware.device}; there "
                "set method.activations=dynamic, or use method=rtn bits=4"
            )
        check_dtype(self.name, hardware)
        same = getattr(torch, hardware.compute_dtype) == DTYPE
        if self.activations == "none" and not same and not hardware.allow_fallback:
            raise ConfigError(
                f"the packed kernel of {self.name} rounds activations to bfloat16, but "
                f"hardware.compute_dtype is {hardware.compute_dtype} and hardware.allow_fallback "
                "is false; set hardware.compute_dtype=bfloat16"
            )

    def stored_bits(self, matrix: Matrix) -> int:
        """4 bits a weight; 16 the scale of each group, and 16 its offset where there is one."""
        groups = matrix.out_features * (matrix.in_features // self.group_size)
        return 4 * matrix.weights + (16 + 16 * self._has_offset) * groups

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out.

        Raises:
            ConfigError: the group size does not divide a width, or the kernel refuses a height.
        """
        selection = self._selection(model)
        return selection.matrices, selection.left_out

    def _selection(self, model: nn.Module) -> Selection:
        selection = select_linears(model, self._scope, whole_maps_only(PACKAGE))
        for matrix in selection.matrices:
            if matrix.in_features % self.group_size or matrix.in_features % 2:
                raise ConfigError(
                    f"{matrix.name} has {matrix.in_features} inputs, which groups of "
                    f"{self.group_size} do not divide; choose another group_size or spare it with "
                    "method.keep"
                )
            if self.activations == "none" and matrix.out_features % KERNEL_ROWS:
                raise ConfigError(
                    f"{matrix.name} has {matrix.out_features} outputs; the packed kernel of "
                    f"{self.name} takes multiples of {KERNEL_ROWS}: spare it with method.keep"
                )
        return selection

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Let torchao quantize `model` and store its codes, scales and offsets as plain tensors."""
        require(PACKAGE, self.name)
        selection = self._selection(model)
        notes = untie(model, self._scope)
        matrices = selection.matrices
        for matrix in matrices:
            check_finite(matrix.name, weight_of(model, matrix))
        biases = {matrix.name: stored_bias(model, matrix) for matrix in matrices}
        linears_only(model, matrices)
        for matrix in matrices:
            linear: Any = model.get_submodule(matrix.name)
            weight = linear.weight.detach().to(DTYPE)
            linear.weight = nn.Parameter(weight, requires_grad=False)
        quantize(self.name, model, matrices, self._config())
        weights = quantized_weights(model)
        layers: dict[str, artefacts.Facts] = {}
        for matrix in matrices:
            stored = self._stored(matrix, weights.pop(matrix.name), biases[matrix.name])
            layers[matrix.name] = {
                "out_features": matrix.out_features,
                "in_features": matrix.in_features,
                "group_size": self.group_size,
                "offset": self._has_offset,
                "bias": dtype_name(stored.bias),
            }
            replace(model, matrix, stored)
        artefacts.save(model, into, layers)
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, bits, selection.left_out, notes)

    def _config(self) -> Any:
        from torchao import quantization
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        if self.activations == "none":
            return PrototypeInt4WeightOnlyConfig(
                group_size=self.group_size,
                int4_choose_qparams_algorithm=self.algorithm,
                # Inductor's settings are global, and nothing is compiled here.
                set_inductor_config=False,
            )
        return quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=INT4,
            weight_granularity=quantization.PerGroup(self.group_size),
            intx_choose_qparams_algorithm={"tinygemm": "affine", "hqq": "hqq_scale_only"}[
                self.algorithm
            ],
        )

    def _stored(self, matrix: Matrix, weight: Any, bias: Tensor | None) -> StoredInt4:
        """Return torchao's tensor for `matrix` as plain ones."""
        if self.activations == "none":
            scale, offset = weight.scale_and_zero.transpose(0, 1).unbind(-1)
            return StoredInt4(pack(opaque_codes(weight), 4), scale, offset, bias)
        if bool(weight.zero_point.any()):
            raise RuntimeError(f"torchao gave {matrix.name} zero points, though it is symmetric")
        codes = (weight.qdata + MIDDLE).to(torch.uint8)
        return StoredInt4(pack(codes, 4), weight.scale, None, bias)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Build torchao's tensors again from the stored ones."""
        require(PACKAGE, self.name)
        if self.activations == "dynamic":
            kernel = "torchao IntxUnpackedToInt8Tensor (a byte a weight): dequantize + aten::linear"
            return self._load(artefact, hardware, unpacked_linear, kernel, "dequantized")
        remark = "" if hardware.compute_dtype == "bfloat16" else " (bfloat16 activations)"
        kernel = f"torchao Int4OpaqueTensor: aten::_weight_int4pack_mm_for_cpu{remark}"
        return self._load(artefact, hardware, OpaqueLinear, kernel, "packed")

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with weights decoded here and multiplied in the hardware's type."""
        kind = RoundedLinear if self.activations == "dynamic" else nn.Linear

        def plain(stored: StoredInt4, dtype: torch.dtype) -> nn.Linear:
            return floating_linear(stored.decode().to(dtype), stored.bias, dtype, kind)

        return self._load(artefact, hardware, plain, "aten::linear", "dequantized")

    def _load(
        self, artefact: Path, hardware: Hardware, build: Any, kernel: str, execution: Execution
    ) -> Engine:
        self.check(hardware)
        dtype = getattr(torch, hardware.compute_dtype)
        model = artefacts.load(
            artefact, lambda name, facts: StoredInt4.empty(facts), dtype, hardware.device
        )
        uses: list[KernelUse] = []
        for name, stored in list(model.named_modules()):
            if not isinstance(stored, StoredInt4):
                continue
            module = build(stored, dtype)
            model.set_submodule(name, module)
            weights = stored.packed.numel() * 2
            uses.append(KernelUse(name, type(module).__name__, kernel, execution, weights))
        return TorchEngine(model, hardware.device, uses)
