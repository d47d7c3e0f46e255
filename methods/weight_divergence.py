"""How far rounded weights are from the weights themselves, as distributions: the search `kl`.

The idea is TensorRT's entropy calibration (S. Migacz, "8-bit Inference with TensorRT", GTC 2017),
made for activations and used here on the weights that share a scale: of their histogram, the mass
outside the grid goes into the outermost bins (the reference), and the mass inside is merged into
the levels and spread again over the bins that were filled (the candidate); the measure is
KL(reference || candidate). `methods.observers.kl_range` reads activations in the same way.

It asks for the shape of a distribution, so it is meant for rows and whole matrices. A group of 32
weights fills so few bins that little but the clipping shows, and the answer is near that of
min/max. And a distribution is not the output of a layer: weights far out are few and carry much.

A histogram has 64 to 2048 equal bins between the smallest and the largest weight, as many as
weights share the scale. Exact zeros (padding, pruned weights) are not counted: every grid has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST_BINS, MOST_BINS = 64, 2048
SMOOTHING = 1e-4
"""Probability, over the number of bins, of a bin that the candidate leaves empty."""


def bins_for(weights: int) -> int:
    """Return the number of bins for a histogram of `weights` weights: a power of two."""
    return min(max(1 << (weights - 1).bit_length(), FEWEST_BINS), MOST_BINS)


def histogram(values: Tensor, lowest: Tensor, highest: Tensor, bins: int) -> Tensor:
    """Return float32 counts [..., bins] of the nonzero `values` [..., size] from low to high.

    `lowest` and `highest` are float32 [...] and hold all values between them.
    """
    width = _width(lowest, highest, bins)
    index = ((values - lowest.unsqueeze(-1)) / width).floor_().clamp_(0, bins - 1).long()
    counts = torch.zeros(*values.shape[:-1], bins)
    return counts.scatter_add_(-1, index, (values != 0).float())


def centres(lowest: Tensor, highest: Tensor, bins: int) -> Tensor:
    """Return the middles of the bins, float32 [..., bins]."""
    steps = torch.arange(bins) + 0.5
    return lowest.unsqueeze(-1) + steps * _width(lowest, highest, bins)


def _width(lowest: Tensor, highest: Tensor, bins: int) -> Tensor:
    # Divided first: the difference of two large float32 numbers can overflow.
    width = (highest / bins - lowest / bins).unsqueeze(-1)
    return torch.where(width > 0, width, torch.ones_like(width))


def divergence(
    counts: Tensor, middles: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    """Return KL(reference || candidate) in nats, float64 [...], for histograms [..., bins].

    `counts` are floating, `middles` float32; `scale` and `zero_point` [...] are a grid's as
    `methods.affine.parameters` gives them. No weight but zeros: 0. None inside the grid: infinity.
    """
    top, bins = 2**bits - 1, counts.shape[-1]
    offset = 2 ** (bits - 1) if zero_point is None else zero_point.float().unsqueeze(-1)
    code = (middles / scale.float().unsqueeze(-1)).round_().add_(offset)
    below, above = code < 0, code > top
    inside = counts.masked_fill(below | above, 0.0)
    reference = inside.clone()
    # Codes grow with the bins, so what lies outside is one run at either end.
    for outside, edge in ((below, below.sum(-1)), (above, bins - 1 - above.sum(-1))):
        moved = (counts * outside).sum(-1, keepdim=True)
        reference.scatter_add_(-1, edge.clamp(0, bins - 1).unsqueeze(-1), moved)
    level = code.clamp_(0, top).long()
    empty = counts.new_zeros(*counts.shape[:-1], top + 1)
    mass = empty.scatter_add(-1, level, inside)
    members = empty.scatter_add(-1, level, (inside > 0).to(counts.dtype))
    candidate = (mass / members.clamp(min=1)).gather(-1, level).mul_(inside > 0)
    total, kept = (part.sum(-1, keepdim=True).double() for part in (counts, inside))
    p, q = reference / total.clamp(min=1), candidate / kept.clamp(min=1)
    terms = torch.where(p > 0, p * (p / q.clamp(min=SMOOTHING / bins)).log(), 0.0).sum(-1)
    lost = (kept == 0) & (total > 0)
    return torch.where(lost.squeeze(-1), torch.inf, terms)
