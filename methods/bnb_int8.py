"""LLM.int8(): INT8 weights and activations, outlier features apart, through bitsandbytes.

Dettmers et al. 2022. A row of the weight and a token of the activations have one symmetric scale
each, max|x| / 127. Features (columns of the input) that reach `threshold` anywhere in the batch
are left out of the integer product and multiplied in floating point with their own columns of the
same INT8 weight, so a token's result depends on the tokens beside it. Both paths run on a CPU too:
with AVX-512 integers through `torch._int_mm`; without it bitsandbytes converts both sides to
float32.

Weights and activations are rounded to float16 before they are scaled, whatever type they have. The
artefact is the checkpoint that users of transformers deploy (`methods.bitsandbytes_engine`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import bitsandbytes_engine as engine
from methods.base import Engine, Hardware, Matrix, QuantizeReport
from methods.layers import Scope, Selection, select_linears
from methods.library import whole_maps_only
from methods.options import names, refuse_emulated

PATH_TOLERANCE = 0.1
"""For `methods.packed.compare_paths`, against float activations: rounding them to INT8 is part of
the method and costs 0.005 to 0.02. Scales of the wrong rows give 0.5 and more."""

NOTE = "outlier features are found over the whole batch: a token depends on those beside it"


@dataclass(frozen=True)
class BnbInt8:
    """LLM.int8().

    Attributes:
        threshold: features that reach it are multiplied in floating point (the paper's is 6.0);
            0: none are.
        keep: patterns of module names to spare.
    """

    name: str
    threshold: float = 6.0
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = False
    path_tolerance: ClassVar[float] = PATH_TOLERANCE

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not number or not 0 <= self.threshold < float("inf"):
            raise ConfigError(
                f"method.threshold of {self.name} is {self.threshold!r}; it must be a number, "
                "0 (no outlier features) or more"
            )
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
        """Refuse FP16 on a CPU, and conversions at each call that the hardware does not allow."""
        refuse_emulated(hardware)
        integers = hardware.device != "cpu" or engine.has_integer_kernel()
        if not integers and not hardware.allow_fallback:
            raise ConfigError(
                "this processor has no AVX-512, without which bitsandbytes converts INT8 to "
                "float32 at each call, and hardware.allow_fallback is false; set it to true"
            )

    def stored_bits(self, matrix: Matrix) -> int:
        """8 bits a weight, 32 a row for its scale, and one byte that names the layout."""
        return 8 * matrix.weights + 32 * matrix.out_features + 8

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out."""
        selection = self._select(model)
        return selection.matrices, selection.left_out

    def _select(self, model: nn.Module) -> Selection:
        return select_linears(model, Scope(keep=names(self.keep)), whole_maps_only(engine.PACKAGE))

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Write the checkpoint; raises ConfigError where a weight is not finite in float16."""
        bitsandbytes = engine.library()

        def build(weight: Tensor) -> nn.Module:
            rows, width = weight.shape
            linear: nn.Module = bitsandbytes.nn.Linear8bitLt(
                width, rows, bias=False, has_fp16_weights=False, device="meta"
            )
            linear.weight = bitsandbytes.nn.Int8Params(
                weight, requires_grad=False, has_fp16_weights=False
            ).to("cpu")
            return linear

        settings = {"load_in_8bit": True, "llm_int8_threshold": float(self.threshold)}
        report = engine.write(model, into, self._select(model), settings, build)
        return dataclasses.replace(report, notes=[NOTE] if self.threshold else [])

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load as users do, through transformers."""
        self.check(hardware)
        return engine.load(artefact, hardware)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with the weights decoded by this project and activations left float."""
        self.check(hardware)
        return engine.load_dequantized(artefact, hardware)
