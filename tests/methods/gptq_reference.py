"""Plain GPTQ and greedy OBQ, written from the papers, to hold a library's results against.

GPTQ: Frantar et al. 2022 (arXiv 2210.17323), algorithm 1. OBQ: Frantar et al. 2022 (arXiv
2208.11580), section 4. Weights are [out, in], inputs [tokens, in], all in float64; grids are
min-max ones that hold 0, as in GPTQ's own code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""GPTQ updates what is behind a block of so many columns at once, and takes grids from there."""


@dataclass(frozen=True)
class Grid:
    """Scale and zero point [out, 1] of one group, for codes 0 .. 2^bits - 1."""

    scale: Tensor
    zero: Tensor
    bits: int

    @staticmethod
    def of(group: Tensor, bits: int, symmetric: bool) -> Grid:
        """Return the grid of weights [out, n]."""
        lowest = group.amin(1, keepdim=True).clamp(max=0)
        highest = group.amax(1, keepdim=True).clamp(min=0)
        if symmetric:
            highest = torch.maximum(-lowest, highest)
            lowest = -highest
        scale = (highest - lowest) / (2**bits - 1)
        middle = torch.full_like(scale, 2 ** (bits - 1))
        return Grid(scale, middle if symmetric else (-lowest / scale).round(), bits)

    def codes(self, weight: Tensor) -> Tensor:
        """Return the codes of the nearest levels to weights [out, n], less the zero point."""
        codes = (weight / self.scale).round() + self.zero
        return codes.clamp(0, 2**self.bits - 1) - self.zero

    def round(self, weight: Tensor) -> Tensor:
        """Return the nearest levels to weights [out, n]."""
        return self.codes(weight) * self.scale

    def store(self, weight: Tensor) -> Tensor:
        """Return the levels as a checkpoint gives them back: with the scale in float16."""
        return self.codes(weight) * self.scale.half().double()


def hessian(inputs: Tensor) -> Tensor:
    """Return 2/n * X^T X, [in, in]."""
    x = inputs.double()
    return 2 * x.T @ x / x.shape[0]


def damped(h: Tensor, damping: float) -> Tensor:
    """Return `h` with `damping` times its mean diagonal added to the diagonal."""
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def output_error(weight: Tensor, rounded: Tensor, inputs: Tensor) -> float:
    """Return the squared error of the layer's outputs, ||(W - Q) X||^2."""
    return float(((weight.double() - rounded.double()) @ inputs.double().T).square().sum())


def rtn(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """Return `weight` rounded to the nearest level of its groups' grids."""
    size = weight.shape[1] if group_size == -1 else group_size
    groups = torch.split(weight.double(), size, dim=1)
    return torch.cat([Grid.of(group, bits, symmetric).store(group) for group in groups], dim=1)


def gptq(
    weight: Tensor,
    h: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
) -> Tensor:
    """Return `weight` rounded by GPTQ for the Hessian `h` [in, in], not yet damped.

    Errors are made up for with the scales as found; the result has them in float16, as stored.
    """
    w = weight.double().clone()
    columns = w.shape[1]
    order = h.diagonal().argsort(descending=True) if act_order else torch.arange(columns)
    w, h = w[:, order], damped(h, damping)[order][:, order]
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    size = columns if group_size == -1 else group_size
    before = w.clone()
    stored = torch.zeros_like(w)
    for column in range(columns):
        if column % BLOCK == 0:
            before = w.clone()
        if column % size == 0:
            grid = Grid.of(before[:, column : column + size], bits, symmetric)
        now = w[:, column : column + 1]
        stored[:, column] = grid.store(now)[:, 0]
        error = (now - grid.round(now)) / factor[column, column]
        w[:, column:] -= error * factor[column, column:]
    return stored[:, order.argsort()]


def obq(weight: Tensor, h: Tensor, bits: int, damping: float = 0.01) -> Tensor:
    """Return `weight` rounded greedily, one scale a row: the cheapest weight is always next."""
    grid = Grid.of(weight.double(), bits, symmetric=False)
    inverse = torch.linalg.inv(damped(h, damping))
    rows = []
    for row in range(weight.shape[0]):
        own = Grid(grid.scale[row : row + 1], grid.zero[row : row + 1], bits)
        rows.append(_obq_row(weight[row].double().clone(), inverse.clone(), own))
    return torch.stack(rows)


def _obq_row(w: Tensor, inverse: Tensor, grid: Grid) -> Tensor:
    rounded = torch.zeros_like(w)
    left = torch.ones_like(w, dtype=torch.bool)
    for _ in range(len(w)):
        levels = grid.round(w[None])[0]
        cost = ((w - levels).square() / inverse.diagonal()).masked_fill(~left, float("inf"))
        chosen = int(cost.argmin())
        rounded[chosen] = levels[chosen]
        pivot = inverse[chosen, chosen].clone()
        w -= (w[chosen] - levels[chosen]) / pivot * inverse[:, chosen]
        inverse -= torch.outer(inverse[:, chosen], inverse[chosen]) / pivot
        left[chosen] = False
        # Used up: the elimination above has set its row and column to zero.
        inverse[chosen, chosen] = 1.0
    return rounded
