"""W8A8 through llm-compressor: INT8 weights by row, INT8 activations by token or by matrix.

The artefact is a compressed-tensors checkpoint as vLLM deploys it, and its integers are what runs
here (`methods/compressed_layers.py`). Its scales are max|w| / 127.5, not / 127. The project's own
INT8 methods differ: `int8_dynamic` has one scale for all tokens of a call, `int8_static` chooses
ranges by observers; here the static range is the largest magnitude seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from methods.base import Calibration
from methods.compressed_oneshot import CompressedMethod, Scheme


@dataclass(frozen=True)
class W8A8(CompressedMethod):
    """Activations rounded at each call, a scale a token: no calibration."""

    @property
    def scheme(self) -> Scheme:
        """INT8, dynamic."""
        return Scheme("int", "dynamic")


@dataclass(frozen=True)
class W8A8Static(CompressedMethod):
    """Activations rounded with one scale a matrix, fixed by calibration.

    Attributes:
        calibration: how much of the calibration text is read.
    """

    calibration: Calibration = field(kw_only=True)

    needs_calibration: ClassVar[bool] = True

    @property
    def scheme(self) -> Scheme:
        """INT8, static."""
        return Scheme("int", "static")
