"""NF4 and FP4: 4-bit codes with one scale a block, through bitsandbytes.

NF4 (Dettmers et al. 2023, QLoRA) places its 16 values at quantiles of a normal distribution; FP4
is a float of one sign, two exponent and one mantissa bit. The scale of a block of consecutive
weights is its largest absolute value. Double quantization stores the scales in 8 bits: a dynamic
map over blocks of 256, about their mean.

The artefact is the checkpoint that users of transformers deploy (`methods.bitsandbytes_engine`).

What computes: on a CPU with AVX512_BF16 a kernel that rounds activations, scales and results to
bfloat16, whatever `compute_dtype` says (only a bias is added in it); on another CPU the weights are
dequantized at each call and multiplied in `compute_dtype`. On CUDA a fused kernel in
`compute_dtype` takes few rows at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import bitsandbytes_engine as engine
from methods.base import Engine, Hardware, Matrix, QuantizeReport
from methods.layers import Scope, Selection, select_linears
from methods.library import whole_maps_only
from methods.options import names, refuse_emulated, require_flags

KINDS = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
NESTED_BLOCK = 256
TYPICAL_OFFSET = 0.043283492922782898
"""A mean of scales as JSON has it: where its digits matter is said in `Bnb4Bit.stored_bits`."""

PATH_TOLERANCE = 0.05
"""For `methods.packed.compare_paths`. The CPU's kernel rounds activations and scales to bfloat16:
0.004 to 0.01 seen. Swapped nibbles or another block's scales give 0.3 and more."""


@dataclass(frozen=True)
class Bnb4Bit:
    """4-bit codes of bitsandbytes.

    Attributes:
        kind: `nf4` or `fp4`.
        block_size: consecutive weights that share a scale: a power of two, 32 to 4096.
        double_quantization: store the scales in 8 bits instead of 32.
        compute_dtype: type in which a matrix multiplies; written into the checkpoint. A CPU with
            AVX512_BF16 takes bfloat16 all the same.
        keep: patterns of module names to spare.
    """

    name: str
    kind: Literal["nf4", "fp4"]
    block_size: int = 64
    double_quantization: bool = False
    compute_dtype: str = "bfloat16"
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = False
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        for field, values in (
            ("kind", KINDS),
            ("block_size", BLOCK_SIZES),
            ("compute_dtype", COMPUTE_DTYPES),
        ):
            value = getattr(self, field)
            if value not in values:
                raise ConfigError(
                    f"method.{field} of {self.name} is {value!r}; "
                    f"it must be one of {', '.join(str(one) for one in values)}"
                )
        require_flags(self.name, {"double_quantization": self.double_quantization})
        object.__setattr__(self, "keep", names(self.keep))

    @property
    def bits(self) -> float:
        """Four, without scales."""
        return 4.0

    @property
    def group_size(self) -> int:
        """The block size: blocks divide the rows."""
        return self.block_size

    def check(self, hardware: Hardware) -> None:
        """Refuse FP16 on a CPU, and bfloat16 kernels where another type is asked for."""
        refuse_emulated(hardware)
        if hardware.device != "cpu":
            return
        if self.compute_dtype == "float16":
            raise ConfigError(
                f"method.compute_dtype of {self.name} is 'float16', which a CPU emulates; "
                "use 'bfloat16' or 'float32'"
            )
        bf16_kernel = bool(torch.cpu._is_avx512_bf16_supported())
        if bf16_kernel and self.compute_dtype != "bfloat16" and not hardware.allow_fallback:
            raise ConfigError(
                f"{engine.CPU_4BIT} computes in bfloat16, not in {self.compute_dtype}, and "
                "hardware.allow_fallback is false; choose method.compute_dtype=bfloat16"
            )

    def stored_bits(self, matrix: Matrix) -> int:
        """Codes, scales, the table of 16 values, and JSON facts as bitsandbytes writes them.

        The JSON holds two values that shape and options do not tell: the name of the checkpoint's
        floating type, taken to have 7 letters, and with double quantization the digits of a mean,
        taken to be 20. A matrix may differ by those few bytes; what a report says is counted.
        """
        blocks = math.ceil(matrix.weights / self.block_size)
        facts: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.block_size,
            "dtype": "float16",
            "shape": [matrix.out_features, matrix.in_features],
        }
        floats = 16 + blocks
        bytes_ = math.ceil(matrix.weights / 2)
        if self.double_quantization:
            facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
            facts |= {"nested_offset": TYPICAL_OFFSET}
            floats = 16 + 256 + math.ceil(blocks / NESTED_BLOCK)
            bytes_ += blocks
        return 8 * (bytes_ + 4 * floats + len(json.dumps(facts)))

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out.

        Raises:
            ConfigError: the block size does not divide a width.
        """
        selection = self._select(model)
        return selection.matrices, selection.left_out

    def _select(self, model: nn.Module) -> Selection:
        selection = select_linears(
            model, Scope(keep=names(self.keep)), whole_maps_only(engine.PACKAGE)
        )
        for matrix in selection.matrices:
            if matrix.in_features % self.block_size:
                fitting = [str(size) for size in BLOCK_SIZES if matrix.in_features % size == 0]
                raise ConfigError(
                    f"layer {matrix.name}: its width {matrix.in_features} is not a multiple of "
                    f"method.block_size {self.block_size}, and bitsandbytes on a CPU then takes "
                    f"the wrong scales; block sizes that fit it: {', '.join(fitting) or 'none'}"
                )
        return selection

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Write the checkpoint; ConfigError where a weight is not finite, or see `select`."""
        bitsandbytes = engine.library()

        def build(weight: Tensor) -> nn.Module:
            rows, width = weight.shape
            linear: nn.Module = bitsandbytes.nn.Linear4bit(width, rows, bias=False, device="meta")
            linear.weight = bitsandbytes.nn.Params4bit(
                weight,
                blocksize=self.block_size,
                compress_statistics=self.double_quantization,
                quant_type=self.kind,
                module=linear,
            ).to("cpu")
            return linear

        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.double_quantization,
            "bnb_4bit_compute_dtype": self.compute_dtype,
        }
        return engine.write(model, into, self._select(model), settings, build)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load as users do, through transformers."""
        self.check(hardware)
        return engine.load(artefact, hardware)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with the weights decoded by this project, to compare with."""
        self.check(hardware)
        return engine.load_dequantized(artefact, hardware)
