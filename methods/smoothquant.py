"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) through llm-compressor, then W8A8.

Input channel j of a linear map is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and the
weight's column multiplied by it, so that outliers of activations move into weights; the division is
folded into the norm before. llm-compressor reads it so: max|X_j| is the range max X_j - min X_j
over the calibration text, max|W_j| is 2 max|W_j| over all maps behind the norm. Where X_j lies
around zero that is the paper's s_j times 2^(2 alpha - 1), the paper's own at alpha 0.5.

Only maps behind a norm are smoothed (q, k, v; gate, up): those behind another map are quantized as
they are. The library knows the norms by the model's class; a class it does not know gets Llama's
mappings, so the smoothed float model is compared with the original before anything is rounded, and
a model that it would change is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from kernels.errors import ConfigError
from methods.base import Calibration
from methods.compressed_oneshot import CompressedMethod, Scheme

ACTIVATIONS = ("static", "dynamic")


@dataclass(frozen=True)
class SmoothQuant(CompressedMethod):
    """W8A8 of a model whose outliers of activations were moved into weights.

    Attributes:
        alpha: how much of them moves, 0 to 1; the paper's 0.5 fits most models.
        activations: static (one scale a matrix, the paper's O3) or dynamic (a scale a token, O1).
        calibration: how much of the calibration text is read.
    """

    alpha: float = 0.5
    activations: Literal["static", "dynamic"] = "static"
    calibration: Calibration = field(kw_only=True)

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not 0 <= self.alpha <= 1:
            raise ConfigError(f"method.alpha is {self.alpha}; it must be 0 to 1")
        if self.activations not in ACTIVATIONS:
            raise ConfigError(
                f"method.activations is {self.activations!r}; smoothquant has "
                f"{' and '.join(ACTIVATIONS)}"
            )

    @property
    def scheme(self) -> Scheme:
        """INT8, as `activations` says."""
        return Scheme("int", self.activations)

    @property
    def smoothing(self) -> float | None:
        """The option alpha."""
        return self.alpha
