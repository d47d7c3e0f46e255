"""Which matrix gets which candidate: by words and patterns, or exactly under a budget.

The budget's problem is the multiple-choice knapsack: of each matrix m one candidate c,

    minimize the sum of kl[m, c], the sum of cost[m, c] being at most the limit,

solved as a mixed integer linear program with a gap of 0 (`scipy.optimize.milp`, HiGHS). That the
KLs of single matrices add up is a model of the mix, not a fact about it. Matrices are named by
structure (first and last decoder block, block numbers, roles), never by what a model calls them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import nn

from kernels.errors import ConfigError
from methods.base import Matrix
from methods.layers import decoder_blocks

Costs = NDArray[np.float64]

UNITS = {"average_bits": "bits a weight", "bytes": "B", "decode_seconds": "s"}

LARGEST_KL = 1e4
"""What the largest KL is scaled to: HiGHS stops at an absolute gap of 1e-6, which is not ours."""

TIE = 1e-4
"""Price of the costliest mix on that scale: 1e-8 of the largest KL. Of equal mixes the cheaper."""

RELATIVE_ROOM = 1e-9
"""Share of the limit by which floating sums may pass it."""


@dataclass(frozen=True)
class Budget:
    """What a mix may cost: at most one of the three, over all matrices in scope.

    Attributes:
        average_bits: stored bits of a weight, scales and zero points counted.
        bytes: stored bytes of the matrices, scales and zero points counted, biases not.
        decode_seconds: of the products of one token with each matrix once, measured.

    Raises:
        ConfigError: two are given, or one is not above 0.
    """

    average_bits: float | None = None
    bytes: float | None = None
    decode_seconds: float | None = None

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) > 1:
            raise ConfigError(
                f"method.budget has {' and '.join(given)}; give one of {', '.join(UNITS)}"
            )
        for kind, wanted in given.items():
            number = isinstance(wanted, int | float) and not isinstance(wanted, bool)
            # Written so that NaN, too, is refused.
            if not number or not 0 < wanted < math.inf:
                raise ConfigError(f"method.budget.{kind} is {wanted!r}; it must be above 0")

    def _given(self) -> dict[str, float]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {kind: wanted for kind, wanted in found.items() if wanted is not None}

    @property
    def kind(self) -> str | None:
        """Which of the three is given, None for none."""
        return next(iter(self._given()), None)

    @property
    def wanted(self) -> float | None:
        """The value that is given, in the unit of its kind."""
        return next(iter(self._given().values()), None)


@dataclass(frozen=True)
class Solution:
    """An optimal mix.

    Attributes:
        chosen: column of each row.
        kl, cost: their sums over the mix.
        solver: JSON facts of the solver's run: name, status, message, gap, nodes.
    """

    chosen: tuple[int, ...]
    kl: float
    cost: float
    solver: dict[str, Any]


def solve(kl: Costs, cost: Costs, limit: float) -> Solution:
    """Return the mix of least KL that costs at most `limit`, which some mix must do.

    `kl` and `cost` are float64 [matrices, candidates]; infinite where there is no such candidate.
    Of mixes whose KL is the same to `TIE` the cheaper is taken.

    Raises:
        RuntimeError: the solver found none, gave no proof, or an answer that breaks the limit.
    """
    there = np.isfinite(kl) & np.isfinite(cost)
    room = limit * (1 + RELATIVE_ROOM)
    # A divergence below 0 is rounding.
    losses = np.where(there, np.maximum(kl, 0), 0.0)
    prices = np.where(there, cost, 0.0)
    largest, dearest = losses.max(), prices.max(axis=1).sum()
    objective = losses * (LARGEST_KL / largest if largest > 0 else 0.0) + prices * (TIE / dearest)
    rows, columns = losses.shape
    one_each = csr_array(np.kron(np.eye(rows), np.ones((1, columns))))
    unit = prices.max()
    found = milp(
        objective.ravel(),
        integrality=np.ones(rows * columns),
        bounds=Bounds(0, there.ravel().astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(prices.reshape(1, -1) / unit, -np.inf, room / unit),
        ],
        options={"mip_rel_gap": 0},
    )
    if found.status != 0 or found.x is None:
        raise RuntimeError(f"the solver ended without an optimal mix: {found.message}")
    chosen = found.x.reshape(rows, columns).argmax(axis=1)
    total = float(np.take_along_axis(prices, chosen[:, None], 1).sum())
    if total > room or not there[np.arange(rows), chosen].all():
        raise RuntimeError(f"the solver's mix costs {total}, the limit is {limit}")
    return Solution(
        tuple(int(column) for column in chosen),
        float(np.take_along_axis(losses, chosen[:, None], 1).sum()),
        total,
        {
            "name": "scipy.optimize.milp (HiGHS)",
            "status": int(found.status),
            "message": str(found.message),
            "gap": float(found.mip_gap),
            "nodes": int(found.mip_node_count),
        },
    )


def smallest(cost: Costs) -> float:
    """Return the least that any mix costs; `cost` [matrices, candidates], infinite: not there."""
    return float(cost.min(axis=1).sum())


@dataclass(frozen=True)
class Place:
    """Where a matrix is: number of its decoder block (None outside them), and its name there."""

    block: int | None
    module: str


class Map:
    """The places of the matrices of a model (may be on meta), and what patterns match them."""

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix]) -> None:
        self.prefix, blocks = decoder_blocks(model)
        self.last = len(blocks) - 1
        self.places = {matrix.name: self._place(matrix) for matrix in matrices}
        self._roles = {matrix.name: matrix.role for matrix in matrices}

    def _place(self, matrix: Matrix) -> Place:
        found = re.match(rf"{re.escape(self.prefix)}\.(\d+)\.(.+)$", matrix.name)
        return Place(int(found[1]), found[2]) if found else Place(None, matrix.name)

    def matching(self, pattern: object) -> list[str]:
        """Return the names of the matrices that `pattern` means, in the model's order.

        `first` and `last` are those of a decoder block, `embedding` and `head` the model's ends;
        anything else is a shell pattern, for a matrix's name or the number of its block.
        """
        word = str(pattern)
        found = []
        for name, place in self.places.items():
            if word in ("first", "last"):
                fits = place.block == (0 if word == "first" else self.last)
            elif word in ("embedding", "head"):
                fits = self._roles[name] == word
            else:
                fits = fnmatchcase(name, word) or (
                    place.block is not None and fnmatchcase(str(place.block), word)
                )
            found += [name] if fits else []
        return found

    def unmatched(self, option: str, pattern: object) -> ConfigError:
        """Return the error of a pattern in `option` that means no matrix."""
        example = next(iter(self.places))
        return ConfigError(
            f"{option} {str(pattern)!r} matches no matrix of the model; there are the words first, "
            f"last, embedding and head, block numbers 0 to {self.last}, and names like {example!r}"
        )


def limit_of(budget: Budget, weights: int) -> float:
    """Return the budget as a limit on the sum of costs: of bits, bytes or seconds."""
    wanted = cast(float, budget.wanted)
    return wanted * weights if budget.kind == "average_bits" else wanted
