"""The parts of RPTQ: ranges of channels, their clusters, and the linear map that reorders.

Conventions: see `methods/rptq.py`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.affine import Affine, quantize
from methods.artefact import dtype_name
from methods.base import Hardware, Matrix
from methods.linear import Layout, QuantizedLinear
from methods.observers import MinMax

RESTARTS = 10
"""Starts of K-means, of which the best is taken: as scikit-learn had it for the authors' code."""

ROUNDS = 100

WIDEST_OFFSET = 2**16
"""Largest distance of a range from zero, in units of its width: codes stay exact in float32."""


class ChannelRanges(MinMax):
    """The smallest and the largest value of each channel (last axis), beside those of all."""

    def __init__(self) -> None:
        super().__init__()
        self.lows: Tensor | None = None
        self.highs: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Widen the ranges to hold floating `x` [..., channels]; refuses what is not finite."""
        super().observe(x)
        tokens = x.detach().reshape(-1, x.shape[-1]).float()
        lows, highs = tokens.aminmax(dim=0)
        self.lows = lows if self.lows is None else torch.minimum(self.lows, lows)
        self.highs = highs if self.highs is None else torch.maximum(self.highs, highs)

    def channels(self) -> tuple[Tensor, Tensor]:
        """Return lows and highs, float32 [channels]; raises ConfigError where nothing was seen."""
        self.range()
        if self.lows is None or self.highs is None:
            raise RuntimeError("a range was seen, but none of its channels")
        return self.lows, self.highs


def k_means(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Return the cluster of each of `points`, float64 [n, d], as int64 [n] below `clusters`.

    Lloyd's rounds from k-means++ starts (Arthur and Vassilvitskii 2007); of `RESTARTS` seeded
    starts the one with the least squared distance. Fewer clusters are used where fewer points
    differ.
    """
    generator = torch.Generator().manual_seed(seed)
    best, best_error = torch.zeros(len(points), dtype=torch.int64), math.inf
    for _ in range(RESTARTS):
        labels, error = _lloyd(points, _spread(points, clusters, generator))
        if error < best_error:
            best, best_error = labels, error
    return best


def _spread(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Return up to `clusters` of `points`: each drawn by its squared distance from those before."""
    first = int(torch.randint(len(points), (1,), generator=generator))
    chosen = [first]
    nearest = (points - points[first]).square().sum(1)
    while len(chosen) < clusters and float(nearest.sum()) > 0:
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Return labels and summed squared distance once no point changes its centre any more."""
    labels = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        # Without matrix products, whose differences of large squares would decide near ties.
        distance = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
        nearest, found = distance.min(1)
        if torch.equal(found, labels):
            break
        labels = found
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        counts = torch.bincount(labels, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return labels, float(nearest.square().sum())


@dataclass(frozen=True)
class Clusters:
    """An order of channels that puts clusters side by side, and the grid of each.

    Attributes:
        order: int64 [channels]: the channel that stands at each place.
        sizes: int64 [clusters]; 0 for one that was not needed.
        scale: float32 [clusters].
        zero_point: int32 [clusters]: value = scale * (code - zero_point).
    """

    order: Tensor
    sizes: Tensor
    scale: Tensor
    zero_point: Tensor


def clusters_of(lows: Tensor, highs: Tensor, clusters: int, bits: int, seed: int) -> Clusters:
    """Cluster channels by their ranges, float32 [channels] each, with a grid of `bits` for each."""
    labels = k_means(torch.stack([lows, highs], 1).double(), clusters, seed)
    sizes = torch.bincount(labels, minlength=clusters)
    none = torch.zeros(clusters)
    low = none.scatter_reduce(0, labels, lows, "amin", include_self=False)
    high = none.scatter_reduce(0, labels, highs, "amax", include_self=False)
    scale, zero_point = grids(low, high, bits)
    return Clusters(labels.argsort(stable=True), sizes, scale, zero_point)


def grids(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale, float32, and zero point, int32, of the grid that spans low to high.

    scale = (high - low) / (2**bits - 1), zero_point = round(-low / scale). The range is not widened
    to hold zero, so the zero point can lie outside the codes.
    """
    largest = torch.maximum(low.abs(), high.abs())
    least = largest / WIDEST_OFFSET
    scale = torch.maximum((high - low) / (2**bits - 1), least)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    return scale, (-low / scale).round().int()


def index_dtype(channels: int) -> torch.dtype:
    """Return the narrowest signed type that numbers `channels`."""
    return torch.int16 if channels <= 2**15 else torch.int32


class ReorderedLinear(QuantizedLinear):
    """Packed weights times inputs that are reordered and rounded: [..., in] -> [..., out].

    Stored beside the packed weight, whose columns are in the new order: order int16 or int32 [in],
    cluster_sizes int32, input_scale float32 and input_zero_point int32 [clusters].
    """

    converter = "reorder, fixed grid a cluster, then quantbench::packed_linear in float32"

    order: Tensor
    cluster_sizes: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, layout: Layout, clusters: int, activation_bits: int) -> None:
        super().__init__(layout)
        self.activation_bits = activation_bits
        width = layout.in_features
        with torch.device("meta"):
            self.order = nn.Buffer(torch.empty(width, dtype=index_dtype(width)))
            self.cluster_sizes = nn.Buffer(torch.empty(clusters, dtype=torch.int32))
            self.input_scale = nn.Buffer(torch.empty(clusters))
            self.input_zero_point = nn.Buffer(torch.empty(clusters, dtype=torch.int32))

    @classmethod
    def empty(cls, facts: dict[str, Any]) -> ReorderedLinear:
        """Return the module that `facts` describe, without values (on meta)."""
        return cls(Layout(**facts["layout"]), facts["clusters"], facts["activation_bits"])

    @classmethod
    def of(
        cls,
        matrix: Matrix,
        weight: Tensor,
        bias: Tensor | None,
        affine: Affine,
        clusters: Clusters,
        activation_bits: int,
    ) -> ReorderedLinear:
        """Round floating weight [out, in] to `affine` with its columns in the clusters' order."""
        rounded = quantize(matrix.name, weight[:, clusters.order], affine)
        layout = dataclasses.replace(Layout.of(matrix, affine), bias=dtype_name(bias))
        linear = cls(layout, len(clusters.sizes), activation_bits)
        linear.fill(rounded, bias)
        linear.order = clusters.order.to(linear.order.dtype)
        linear.cluster_sizes = clusters.sizes.int()
        linear.input_scale = clusters.scale
        linear.input_zero_point = clusters.zero_point
        return linear

    def facts(self) -> dict[str, Any]:
        """Return the JSON facts from which `empty` builds this module again."""
        return {
            "layout": asdict(self.layout),
            "clusters": len(self.cluster_sizes),
            "activation_bits": self.activation_bits,
        }

    def prepare(self, name: str, hardware: Hardware, packed: bool = True) -> None:
        """Give every channel the grid of its cluster; the stored tensors stay as they are."""
        super().prepare(name, hardware, packed=False)
        self._remark = ""
        sizes = self.cluster_sizes.long()
        self.index = self.order.long()
        self.step = self.input_scale.repeat_interleave(sizes)
        self.zero = self.input_zero_point.float().repeat_interleave(sizes)

    def round_input(self, x: Tensor) -> Tensor:
        """Return floating x [..., in] reordered and rounded to its grids; float32 [..., in]."""
        levels = 2**self.activation_bits - 1
        codes = x.index_select(-1, self.index).float() / self.step
        codes = codes.round_().add_(self.zero).clamp_(0, levels)
        return codes.sub_(self.zero).mul_(self.step)

    def forward(self, x: Tensor) -> Tensor:
        """Reorder and round `x`, multiply by the reordered weight, add the bias."""
        return super().forward(self.round_input(x)).to(x.dtype)
