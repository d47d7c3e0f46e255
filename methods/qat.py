"""Quantization-aware training: a few hundred steps with the weights rounded, then packed.

Jacob et al. 2018 (arXiv 1712.05877), with the straight-through estimator of Bengio et al. 2013
(`methods.straight_through`): each step rounds every weight as round-to-nearest does (`methods.rtn`:
range, scale and zero point are those of the weights as they are now), computes the loss of the
rounded model, and moves the unrounded weights. What is trained on is calibration text.

`engine: torchao` rounds with torchao's own modules (`torchao.quantization.qat`: `QATConfig` with an
`IntxFakeQuantizeConfig`). torchao's symmetric range is wider than ours: scale = max|w| / (2**bits -
1) * 2, so that the largest positive weight is clipped by half a level, without a gradient. Codes
and scales are taken out of its modules and stored in this project's format, which holds them as
they are. What does not fit is refused: zero points (torchao's are those of another formula), and
rounded tokens, which torchao rounds asymmetrically and this project's kernels symmetrically.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from kernels.errors import ConfigError
from methods.base import Hardware, Matrix
from methods.library import require
from methods.options import require_flags
from methods.quantization_aware import QuantizationAware
from methods.rtn import TERNARY
from methods.straight_through import NearestLevels, NotRounded, WeightRounding
from methods.torchao_qat import TorchaoLevels

ENGINES = ("quantbench", "torchao")


@dataclass(frozen=True)
class QAT(QuantizationAware):
    """Quantization-aware training with round-to-nearest.

    Attributes:
        symmetric: no zero points.
        engine: what rounds in training: `quantbench` or `torchao`.
        fake_quantize: false trains without rounding and rounds at the end: what the text alone
            gives, to compare with.
    """

    symmetric: bool = False
    engine: str = "quantbench"
    fake_quantize: bool = True

    kind: ClassVar[str] = "qat"

    def __post_init__(self) -> None:
        flags: dict[str, object] = {
            "symmetric": self.symmetric,
            "fake_quantize": self.fake_quantize,
        }
        require_flags(self.name, flags)
        super().__post_init__()
        if self.engine not in ENGINES:
            raise ConfigError(
                f"method.engine of {self.name} is {self.engine!r}; it must be one of "
                f"{', '.join(ENGINES)}"
            )
        if self.engine == "torchao":
            self._check_torchao()

    def _check_torchao(self) -> None:
        owner = f"method.engine=torchao of {self.name}"
        if not self.symmetric:
            raise ConfigError(
                f"{owner} has no zero points that this project stores; set method.symmetric=true"
            )
        if self.activation_bits is not None:
            raise ConfigError(
                f"{owner} rounds tokens asymmetrically, which no kernel here reads; set "
                "method.activation_bits=null, or method.engine=quantbench"
            )
        if not self.fake_quantize:
            raise ConfigError(
                f"{owner} has nothing to do without rounding; set method.engine=quantbench"
            )

    @property
    def stored_symmetric(self) -> bool:
        """As the option says."""
        return self.symmetric

    @property
    def trained_with(self) -> str:
        """The engine."""
        return self.engine

    @property
    def rounds_in_training(self) -> bool:
        """As the option says."""
        return self.fake_quantize

    def check(self, hardware: Hardware) -> None:
        """Refuse what round-to-nearest refuses on this hardware, and a library that is missing."""
        super().check(hardware)
        if self.engine == "torchao":
            require("torchao", f"method.engine=torchao of {self.name}")

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return what is quantized and what is left.

        Raises:
            ConfigError: the group size does not divide a width, or torchao is asked to round
                stacks of experts or rows whose last group is not full.
        """
        matrices, left_out = super().select(model)
        for matrix in matrices if self.engine == "torchao" else ():
            self._check_fits_torchao(matrix)
        return matrices, left_out

    def _check_fits_torchao(self, matrix: Matrix) -> None:
        if matrix.count > 1:
            raise ConfigError(
                f"layer {matrix.name} is a stack of experts, which torchao does not round in "
                "training; set method.engine=quantbench, or spare it with method.keep"
            )
        if self.format.affine.padded(matrix.in_features) != matrix.in_features:
            raise ConfigError(
                f"layer {matrix.name}: torchao rounds whole groups in training, and group_size "
                f"{self.group_size} does not divide {matrix.in_features}; set "
                "method.engine=quantbench, or another group_size"
            )

    def told(self, details: dict[str, Any]) -> list[str]:
        """Return what a reader of the row must know of the training and of its codes."""
        ternary = self.symmetric and self.bits == 2 and self.engine == "quantbench"
        return [*super().told(details), *([TERNARY] if ternary else [])]

    def rounding(self, model: nn.Module, matrices: list[Matrix]) -> WeightRounding:
        """Return how the weights of `model` are rounded; torchao exchanges its linear maps."""
        affine = self.format.affine
        if self.engine == "torchao":
            return TorchaoLevels(model, matrices, affine)
        return NearestLevels(affine) if self.fake_quantize else NotRounded(affine)
