"""A weight matrix as it is stored: what every packed linear map is built from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A stored matrix: tensors and sizes as `kernels.reference.packed_linear` takes them.

    `columns` is the true width of a row; the groups may cover more.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    columns: int
