"""FP8 weights by row; activations as they are, or FP8 by token or by matrix.

E4M3 (4 bits of exponent, 3 of mantissa, largest value 448; Micikevicius et al. 2022, arXiv
2209.05433) goes through llm-compressor: the artefact is a compressed-tensors checkpoint as vLLM
deploys it. E5M2 (57344, one bit less of mantissa) is unknown to compressed-tensors 0.19, so it is
rounded here (`methods/fp8_e5m2.py`) and stored in this project's container: vLLM does not load
that. One format serves weights and activations.

A CPU has no fast FP8 products (`torch._scaled_mm` takes 10 to 60 times as long as a product of
floats): weights are converted at each call, `dequantized`. On a card with FP8 units E4M3 weights
and activations go through `torch._scaled_mm`; on a CPU tests run the same call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from kernels.errors import ConfigError
from methods import fp8_e5m2
from methods.base import Calibration, Engine, Hardware, Matrix
from methods.compressed_oneshot import CompressedMethod, Scheme

FORMATS = ("e4m3", "e5m2")


@dataclass(frozen=True)
class _Fp8(CompressedMethod):
    """What the two share.

    Attributes:
        format: e4m3 or e5m2, see above.
    """

    format: Literal["e4m3", "e5m2"] = "e4m3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in FORMATS:
            raise ConfigError(
                f"method.format is {self.format!r}; it must be one of {', '.join(FORMATS)}"
            )

    def write(
        self,
        model: Any,
        tokenizer: Any,
        matrices: Sequence[Matrix],
        calibration: Tensor | None,
        into: Path,
    ) -> None:
        """Write a compressed-tensors checkpoint, or this project's container for E5M2."""
        if self.format == "e4m3":
            super().write(model, tokenizer, matrices, calibration, into)
        else:
            fp8_e5m2.write(model, matrices, self.scheme.activations, calibration, into)

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the stored bytes into modules that run them."""
        if self.format == "e4m3":
            return super().load(artefact, hardware)
        self.check(hardware)
        return fp8_e5m2.load(artefact, hardware)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with float weights and activations rounded in float: `simulated`."""
        if self.format == "e4m3":
            return super().load_dequantized(artefact, hardware)
        self.check(hardware)
        return fp8_e5m2.load_dequantized(artefact, hardware)


@dataclass(frozen=True)
class Fp8(_Fp8):
    """FP8 without calibration.

    Attributes:
        activations: none (weight only) or dynamic (rounded at each call, a scale a token).
    """

    activations: Literal["none", "dynamic"] = "dynamic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations not in ("none", "dynamic"):
            raise ConfigError(
                f"method.activations is {self.activations!r}; fp8 has none and dynamic "
                "(static ones calibrate: method=fp8_static)"
            )

    @property
    def scheme(self) -> Scheme:
        """FP8, as `activations` says."""
        return Scheme("float", self.activations)


@dataclass(frozen=True)
class Fp8Static(_Fp8):
    """FP8 with one scale a matrix for activations, fixed by calibration.

    Attributes:
        calibration: how much of the calibration text is read.
    """

    calibration: Calibration = field(kw_only=True)

    needs_calibration: ClassVar[bool] = True

    @property
    def scheme(self) -> Scheme:
        """FP8, static."""
        return Scheme("float", "static")
