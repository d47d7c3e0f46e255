"""INT8 with dynamic activations: weights are INT8, activations are measured and rounded per call.

On a CPU this is PyTorch's own `torch.ao.quantization.quantize_dynamic`: it makes the weights, and
the modules that run are its `torch.ao.nn.quantized.dynamic.Linear`, rebuilt from plain tensors. Its
conventions, read from the source of PyTorch 2.13 and confirmed by running it:

- Weights: int8 symmetric, scale = max|w| / 127.5 over the tensor (`per_channel: true`: over each
  row), q in -128..127.
- Activations: unsigned, affine, one scale for everything handed to the layer at a call. So a
  token's result depends on the tokens beside it: prefill, decode and other batch sizes differ.
- Engine `x86`, the default, runs linears through fbgemm (`onednn` and `fbgemm` can be chosen;
  ARM has `qnnpack`). `Linear` asks for `reduce_range`: 7-bit activations, 0..127, so that two
  products fit the 16-bit sums of processors without VNNI. x86, fbgemm and onednn obey although VNNI
  makes it needless, qnnpack ignores it. The price: the step, and with it the rounding error of
  activations, is twice that of 8 bits, and its square four times. `int8_static` has all 8 bits:
  in a model of 6 M parameters its KL divergence was 0.003 to 0.006, that of this method 0.015.
- The kernel takes float32 activations only.
- Embeddings (`embeddings: true`): uint8 rows with a float32 scale and zero point each
  (`float_qparams_weight_only_qconfig`; the qint8 that scripts often pass raises an error).

On CUDA the same artefact runs through torchao's `Int8DynamicActivationInt8WeightConfig` scheme:
its `Int8Tensor` around the stored weights, activations int8 symmetric per token. That needs a card;
on a CPU tests run the same module through torchao's own CPU kernel.
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
from methods.encoder_engine import engine_of
from methods.int8_dynamic_layers import (
    INT_MM_MULTIPLE,
    PackedEmbedding,
    PackedLinear,
    StoredEmbedding,
    StoredLinear,
    TorchaoLinear,
    announced_removals_silenced,
)
from methods.int8_linear import DEQUANTIZED, PATH_TOLERANCE, STACKED_EXPERTS, untie
from methods.layers import Scope, check_finite, replace, select_linears, weight_of
from methods.library import linears_only
from methods.options import names, require_flags

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Int8Dynamic:
    """INT8 weights, activations rounded at each call.

    Attributes:
        per_channel: one weight scale a row instead of one a matrix, PyTorch's default.
        head, embeddings, keep: scope, as for every method.
    """

    name: str
    per_channel: bool = False
    head: bool = False
    embeddings: bool = False
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = False
    encoders: ClassVar[bool] = True
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        flags = {field: getattr(self, field) for field in ("per_channel", "head", "embeddings")}
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
        return Scope(self.head, self.embeddings, names(self.keep))

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError where no kernel runs these options."""
        if hardware.device == "cuda":
            if self.embeddings:
                raise ConfigError(
                    "method.embeddings of int8_dynamic needs quantized::embedding_byte, a CPU "
                    "kernel; set it to false on cuda"
                )
            if find_spec("torchao") is None:
                raise ConfigError(
                    "int8_dynamic on cuda runs through torchao, which is not installed"
                )
            return
        if hardware.compute_dtype != "float32":
            raise ConfigError(
                "int8_dynamic on a CPU takes float32 activations only, not "
                f"{hardware.compute_dtype}; set hardware.compute_dtype=float32"
            )
        if torch.backends.quantized.engine == "none":
            raise ConfigError("this PyTorch was built without an engine for quantized CPU kernels")

    def stored_bits(self, matrix: Matrix) -> int:
        """8 bits a weight, and 32 + 32 a scale and zero point: a row's, or the matrix's."""
        by_row = self.per_channel or matrix.role == "embedding"
        return 8 * matrix.weights + 64 * (matrix.out_features if by_row else 1)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps (and embedding) in scope, and what is left out."""
        selection = select_linears(model, self._scope, STACKED_EXPERTS)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Let PyTorch quantize `model` and store its integers as plain tensors."""
        matrices, left_out = self.select(model)
        notes = untie(model, self._scope)
        for matrix in matrices:
            check_finite(matrix.name, weight_of(model, matrix))
        biases = {matrix.name: stored_bias(model, matrix) for matrix in matrices}
        linears_only(model, matrices)
        self._quantize_dynamic(model, matrices)
        layers: dict[str, artefacts.Facts] = {}
        for matrix in matrices:
            quantized = model.get_submodule(matrix.name)
            bias = biases[matrix.name]
            stored = (
                StoredEmbedding.of(quantized)
                if matrix.role == "embedding"
                else StoredLinear.of(quantized, bias)
            )
            layers[matrix.name] = {
                "layer": matrix.role,
                "out_features": matrix.out_features,
                "in_features": matrix.in_features,
                "per_channel": self.per_channel,
                "bias": dtype_name(bias),
            }
            replace(model, matrix, stored)
        artefacts.save(model, into, layers)
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, bits, left_out, notes)

    def _quantize_dynamic(self, model: nn.Module, matrices: list[Matrix]) -> None:
        """Run PyTorch's quantize_dynamic over exactly `matrices`; raise where it skips one."""
        with announced_removals_silenced():
            from torch.ao import quantization

            linear = (
                quantization.per_channel_dynamic_qconfig
                if self.per_channel
                else quantization.default_dynamic_qconfig
            )
            embedding = quantization.float_qparams_weight_only_qconfig
            wanted = {m.name: embedding if m.role == "embedding" else linear for m in matrices}
            convert: Any = quantization.quantize_dynamic  # carries no types
            convert(model, wanted, inplace=True)
        for matrix in matrices:
            module: Any = model.get_submodule(matrix.name)
            if not type(module).__module__.startswith("torch.ao.nn.quantized"):
                raise ConfigError(
                    f"PyTorch's quantize_dynamic does not convert {matrix.name}, a "
                    f"{type(module).__name__}; spare it with method.keep"
                )

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Rebuild PyTorch's modules on a CPU, torchao's tensors on a card."""
        return self._load(artefact, hardware, dequantized=False)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with the same rounded values multiplied in floating point, to compare with."""
        return self._load(artefact, hardware, dequantized=True)

    def _load(self, artefact: Path, hardware: Hardware, dequantized: bool) -> Engine:
        self.check(hardware)
        dtype = DTYPES[hardware.compute_dtype]
        model = artefacts.load(artefact, _empty, dtype, hardware.device)
        uses: list[KernelUse] = []
        for name, stored in list(model.named_modules()):
            if not isinstance(stored, StoredLinear | StoredEmbedding):
                continue
            module = _runnable(name, stored, hardware.device, dtype)
            module.dequantized = dequantized
            model.set_submodule(name, module)
            uses.append(
                KernelUse(
                    name,
                    type(module).__name__,
                    DEQUANTIZED if dequantized else module.kernel,
                    "dequantized" if dequantized else "packed",
                    stored.weight.numel(),
                )
            )
        # On a CPU one scale holds for the activations of a call, on a card one for each token.
        return engine_of(model, hardware.device, uses, couples_rows=hardware.device == "cpu")


def _runnable(
    name: str, stored: StoredLinear | StoredEmbedding, device: str, dtype: torch.dtype
) -> PackedLinear | TorchaoLinear | PackedEmbedding:
    if isinstance(stored, StoredEmbedding):
        return PackedEmbedding(stored)
    if device == "cpu":
        return PackedLinear(stored)
    if any(size % INT_MM_MULTIPLE for size in stored.weight.shape):
        raise ConfigError(
            f"{name} is {list(stored.weight.shape)}; torch._int_mm on CUDA needs multiples of "
            f"{INT_MM_MULTIPLE}: spare it with method.keep"
        )
    return TorchaoLinear(stored, dtype)


def _empty(name: str, facts: artefacts.Facts) -> nn.Module:
    kind = StoredEmbedding if facts["layer"] == "embedding" else StoredLinear
    return kind.empty(facts)
