"""RPTQ: channels of activations are reordered into clusters of like range, with a grid for each.

Yuan et al. 2023 (arXiv 2304.01089). Calibration text gives each channel its range (min, max);
K-means clusters the channels of a linear map's input by these two numbers; channels are reordered
so that a cluster lies side by side, the columns of the weight with them; each cluster has one fixed
scale and zero point. Weights have one scale a row, asymmetric. W4A8 and W4A4: `bits` and
`activation_bits`.

What is as in the paper and its code (hahnyuan/RPTQ4LLM), and what is not:

- The paper folds the reordering into the norm before (which writes in the new order) or into the
  rows of the weight before. Here its index is stored with the matrix and applied to the input: the
  same values reach the product, at the cost of a gather.
- Covered are the inputs of linear maps. The paper also rounds queries, keys, values (the cache) and
  attention weights; here these stay in floating point.
- `activation_bits` holds for every input. The authors' code keeps what comes out of a norm at 8
  bits or more, even for its W4A4.
- Weights are rounded to nearest; the authors take GPTQ.
- Ranges are the least and the greatest value seen by the unquantized model; the authors' code
  averages them over samples and calibrates each layer behind quantized ones.
- scale = (max - min) / (2**bits - 1), so that both ends are on the grid; the paper divides by
  2**bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import artefact as artefacts
from methods.affine import Affine
from methods.artefact import stored_bias
from methods.base import Calibration, Engine, Hardware, Matrix, QuantizeReport
from methods.layers import Scope, check_finite, replace, select_linears, weight_of
from methods.linear import Layout
from methods.observers import named, observe_inputs
from methods.options import names, need_calibration, refuse_emulated
from methods.rounded_activations import (
    STACKED_EXPERTS,
    load_engine,
)
from methods.rptq_layers import ChannelRanges, ReorderedLinear, clusters_of, index_dtype

ACTIVATION_BITS = (8, 4)
COVERED = (
    "inputs of linear maps are rounded; queries, keys, values and attention weights are not, as "
    "the paper has them; weights are rounded to nearest, where the paper takes GPTQ"
)


@dataclass(frozen=True)
class RPTQ:
    """Low-bit weights, and activations on one fixed grid a cluster of channels.

    Attributes:
        bits: of weights, see `methods.affine.Affine`; one scale a row.
        calibration: how much of the calibration text is read.
        activation_bits: 8 or 4.
        clusters: of the input channels of a matrix; no more than it has.
        keep: patterns of module names that stay as they are.
    """

    name: str
    bits: int
    calibration: Calibration
    activation_bits: int = 8
    clusters: int = 32
    keep: Sequence[str] = ()

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _ = self._affine
        if self.activation_bits not in ACTIVATION_BITS:
            raise ConfigError(
                f"method.activation_bits of rptq is {self.activation_bits}; it must be 8 or 4"
            )
        if self.clusters < 1:
            raise ConfigError(f"method.clusters of rptq is {self.clusters}; it must be 1 or more")
        object.__setattr__(self, "keep", names(self.keep))

    @property
    def _affine(self) -> Affine:
        return Affine(self.bits)

    @property
    def group_size(self) -> int:
        """One weight scale a row."""
        return self._affine.group_size

    def check(self, hardware: Hardware) -> None:
        """Refuse FP16 activations on a CPU."""
        refuse_emulated(hardware)

    def _clusters(self, matrix: Matrix) -> int:
        return min(self.clusters, matrix.in_features)

    def stored_bits(self, matrix: Matrix) -> int:
        """Bits of the packed weight, of the order, and of each cluster's size and grid."""
        order = 8 * index_dtype(matrix.in_features).itemsize * matrix.in_features
        return (
            Layout.of(matrix, self._affine).stored_bits
            + order
            + (32 + 32 + 32) * self._clusters(matrix)
        )

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out."""
        selection = select_linears(model, Scope(keep=names(self.keep)), STACKED_EXPERTS)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Measure channel ranges on `calibration`, int64 [samples, seq_len]; then cluster, store.

        Raises:
            ConfigError: there is no calibration text, or a weight or activation is not finite.
        """
        calibration = need_calibration("rptq", calibration)
        matrices, left_out = self.select(model)
        for matrix in matrices:
            check_finite(matrix.name, weight_of(model, matrix))
        ranges = {matrix.name: ChannelRanges() for matrix in matrices}
        observe_inputs(model, calibration, ranges)
        layers: dict[str, artefacts.Facts] = {}
        for matrix in matrices:
            linear = self._quantize_one(model, matrix, ranges[matrix.name])
            layers[matrix.name] = linear.facts()
            replace(model, matrix, linear)
        artefacts.save(model, into, layers)
        bits = sum(self.stored_bits(matrix) for matrix in matrices)
        return QuantizeReport(matrices, bits, left_out, [COVERED])

    def _quantize_one(
        self, model: nn.Module, matrix: Matrix, ranges: ChannelRanges
    ) -> ReorderedLinear:
        with named(matrix.name):
            lows, highs = ranges.channels()
        clusters = clusters_of(
            lows, highs, self._clusters(matrix), self.activation_bits, self.calibration.seed
        )
        return ReorderedLinear.of(
            matrix,
            weight_of(model, matrix),
            stored_bias(model, matrix),
            self._affine,
            clusters,
            self.activation_bits,
        )

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with layers that reorder and round their input."""
        self.check(hardware)
        return load_engine(artefact, hardware, ReorderedLinear.empty)
