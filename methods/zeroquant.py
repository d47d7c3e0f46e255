"""ZeroQuant: weights rounded in groups, activations to INT8 token by token; no calibration.

Yao et al. 2022 (arXiv 2206.01861), sections 4.1 and 5: W8A8 and W4A8. Left out is the layer-by-
layer distillation (LKD, section 4.2), which trains, so W4A8 here loses more than the paper's.

Conventions:

- Weights: those of `methods.affine`, symmetric by default as in the released configurations, with
  scale = max|w| / (2**(bits - 1) - 1).
- Activations: symmetric, one scale a token, max|x| / 127 at each call. DeepSpeed divides by
  2**(bits - 1) in both places, and clips what is largest.
- Groups: the paper counts them (48 a matrix for BERT-base, 64 for GPT-2), and DeepSpeed cuts the
  matrix into that many runs of whole rows. Here as everywhere `group_size` counts the inputs that
  share a scale: g groups of a matrix [out, in] with g <= out are coarser than `group_size=-1`.

An integer product would need one call a group, and PyTorch has no kernel that takes scales of
groups and tokens: the rounded activations are multiplied in float32 by weights that are converted
at each call. The sums are those of the integers, but for float32's last bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.base import Engine, Hardware, Matrix, QuantizeReport
from methods.layers import Scope, Selection, select_linears
from methods.linear import Layout, QuantizedLinear
from methods.options import names, refuse_emulated, require_flags
from methods.rounded_activations import (
    STACKED_EXPERTS,
    load_engine,
    round_tokens,
)
from methods.rtn import RTN

BITS = (8, 4)
WITHOUT_DISTILLATION = (
    "without the layer-by-layer distillation of the paper, which recovers part of what 4-bit "
    "weights lose"
)


class TokenLinear(QuantizedLinear):
    """Packed weights times tokens rounded to INT8: [..., in] -> [..., out] in the input's type."""

    converter = "INT8 per token, then quantbench::packed_linear in float32"

    def prepare(self, name: str, hardware: Hardware, packed: bool = True) -> None:
        """Keep the stored weights: no kernel multiplies integers with a scale a group."""
        super().prepare(name, hardware, packed=False)
        self._remark = ""

    def forward(self, x: Tensor) -> Tensor:
        """Round each token, multiply by the weight, add the bias."""
        return super().forward(round_tokens(x)).to(x.dtype)


@dataclass(frozen=True)
class ZeroQuant:
    """Group-wise weights and token-wise INT8 activations.

    Attributes:
        bits: of weights: 8 or 4.
        group_size, symmetric, scale_dtype: of weights, see `methods.affine.Affine`.
        head, keep, on_indivisible: as for `methods.rtn.RTN`.
    """

    name: str
    bits: int
    group_size: int
    symmetric: bool = True
    scale_dtype: str = "float16"
    head: bool = False
    keep: Sequence[str] = ()
    on_indivisible: str = "error"

    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(
                f"zeroquant has weights of 8 or 4 bits, not {self.bits}; set bits=8 or bits=4"
            )
        require_flags(self.name, {"symmetric": self.symmetric, "head": self.head})
        object.__setattr__(self, "keep", names(self.keep))
        # The other options are checked here, before any weight is loaded.
        _ = self._weights

    @property
    def _weights(self) -> RTN:
        """How weights are rounded and stored."""
        return RTN(
            self.name,
            self.bits,
            self.group_size,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype,
            head=self.head,
            keep=names(self.keep),
            on_indivisible=self.on_indivisible,
        )

    def check(self, hardware: Hardware) -> None:
        """Refuse FP16 activations on a CPU."""
        refuse_emulated(hardware)

    def stored_bits(self, matrix: Matrix) -> int:
        """Bits of the packed weights, scales and zero points of `matrix`, padding included."""
        return self._weights.stored_bits(matrix)

    def _select(self, model: nn.Module) -> tuple[RTN, Selection]:
        """Return what rounds the weights of `model`, and what that covers: no stack of experts."""
        selection = select_linears(
            model, Scope(self.head, False, names(self.keep)), STACKED_EXPERTS
        )
        # Names in `left_out` stand for all blocks: they are the patterns that `keep` takes.
        stacks = [name for name, _, reason in selection.left_out if reason == STACKED_EXPERTS]
        rtn = dataclasses.replace(self._weights, keep=(*self._weights.keep, *stacks))
        # Asked for its refusal of widths that no group divides.
        rtn.select(model)
        return rtn, selection

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the linear maps in scope, and what is left out.

        Raises:
            ConfigError: the group size does not divide a width and `on_indivisible` is `error`.
        """
        _, selection = self._select(model)
        return selection.matrices, selection.left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Round the weights and write them packed; activations are rounded when it runs."""
        rtn, selection = self._select(model)
        report = rtn.quantize(model, tokenizer, None, into)
        return dataclasses.replace(
            report, left_out=selection.left_out, notes=[WITHOUT_DISTILLATION, *report.notes]
        )

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load with layers that round their input token by token."""
        self.check(hardware)
        return load_engine(artefact, hardware, lambda facts: TokenLinear(Layout(**facts)))
