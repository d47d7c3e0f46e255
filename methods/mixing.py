"""The modules that a mix is made of: what each costs, and what a plan stores.

A plan is matrix -> candidate; `AS_IT_WAS` is the candidate that leaves a matrix in the floating
type of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from kernels.errors import ConfigError
from methods.allocation import Budget, Costs, Map
from methods.artefact import checkpoint_dtype
from methods.base import Hardware, Matrix
from methods.layers import bias_of, weight_of
from methods.linear import QuantizedModule
from methods.product_seconds import product_seconds

AS_IT_WAS = "unquantized"
"""The candidate that is no method: the matrix in the checkpoint's floating type."""


@dataclass(frozen=True)
class Mixing:
    """A model (float32), its matrices in scope, and candidate -> matrix -> packed module."""

    model: nn.Module
    matrices: Sequence[Matrix]
    modules: Mapping[str, Mapping[str, nn.Module]]

    @property
    def columns(self) -> list[str]:
        """Names of the candidates, `AS_IT_WAS` last."""
        return [*self.modules, AS_IT_WAS]

    @property
    def weights(self) -> int:
        """Weights of all matrices in scope."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def _width(self) -> int:
        """Bits of the checkpoint's floating type."""
        return 8 * checkpoint_dtype(self.model).itemsize

    def module(self, name: str, candidate: str) -> QuantizedModule | None:
        """Return the packed module of matrix `name`, None where it stays as it was."""
        if candidate == AS_IT_WAS:
            return None
        found = self.modules[candidate][name]
        if not isinstance(found, QuantizedModule):
            raise TypeError(f"{candidate} made a {type(found).__name__} of {name}")
        return found

    def chosen(self, plan: Mapping[str, str]) -> dict[str, QuantizedModule]:
        """Return matrix -> packed module, without the matrices that stay as they were."""
        made = {name: self.module(name, candidate) for name, candidate in plan.items()}
        return {name: module for name, module in made.items() if module is not None}

    def bits(self, matrix: Matrix, candidate: str) -> int:
        """Return the stored bits of `matrix`, its scales counted, its bias not."""
        module = self.module(matrix.name, candidate)
        if module is None:
            return self._width * matrix.weights
        return sum(8 * part.nbytes for name, part in module.named_buffers() if name != "bias")

    def stored(self, plan: Mapping[str, str]) -> int:
        """Return the stored bits of all matrices."""
        return sum(self.bits(matrix, plan[matrix.name]) for matrix in self.matrices)

    def code_bits(self, plan: Mapping[str, str]) -> float:
        """Return the average bits of a weight without scales."""
        rows = self.rows(plan, {})
        return float(sum(row["bits"] * row["weights"] for row in rows) / self.weights)

    def rows(self, plan: Mapping[str, str], kls: Mapping[str, float]) -> list[dict[str, Any]]:
        """Return JSON facts of each matrix; `kls` are those of the chosen candidates, nats."""
        places = Map(self.model, self.matrices).places
        rows = []
        for matrix in self.matrices:
            module = self.module(matrix.name, plan[matrix.name])
            rows.append(
                {
                    "name": matrix.name,
                    "block": places[matrix.name].block,
                    "module": places[matrix.name].module,
                    "candidate": plan[matrix.name],
                    "bits": float(self._width if module is None else module.layout.bits),
                    "group_size": None if module is None else module.layout.group_size,
                    "weights": matrix.weights,
                    "kl": kls.get(matrix.name),
                }
            )
        return rows

    def costs(
        self, budget: Budget, allowed: Mapping[str, Sequence[str]], hardware: Hardware | None
    ) -> Costs:
        """Return bits, bytes or seconds, float64 [matrices, columns]; infinite: not allowed.

        Raises:
            ConfigError: seconds are asked for of what is no linear map.
        """
        if budget.kind == "decode_seconds" and hardware is not None:
            return self._seconds(allowed, hardware)
        unit = 8 if budget.kind == "bytes" else 1
        found = np.full((len(self.matrices), len(self.columns)), np.inf)
        for row, matrix in enumerate(self.matrices):
            for column, candidate in enumerate(self.columns):
                if candidate in allowed[matrix.name]:
                    found[row, column] = self.bits(matrix, candidate) / unit
        return found

    def _seconds(self, allowed: Mapping[str, Sequence[str]], hardware: Hardware) -> Costs:
        """Return seconds of one token's products, measured once a shape and candidate."""
        keys: dict[tuple[int, int], tuple[int, int, str]] = {}
        products: dict[tuple[int, int, str], tuple[nn.Module, int]] = {}
        for row, matrix in enumerate(self.matrices):
            if matrix.count > 1 or matrix.role == "embedding":
                raise ConfigError(
                    f"{matrix.name} is no linear map, and method.budget.decode_seconds times "
                    "products of linear maps; use average_bits or bytes for this model"
                )
            for column, candidate in enumerate(self.columns):
                if candidate in allowed[matrix.name]:
                    key = (matrix.out_features, matrix.in_features, candidate)
                    keys[row, column] = key
                    if key not in products:
                        module = self.module(matrix.name, candidate) or self._plain(matrix)
                        products[key] = (module, matrix.in_features)
        seconds = product_seconds(products, hardware)
        found = np.full((len(self.matrices), len(self.columns)), np.inf)
        for place, key in keys.items():
            found[place] = seconds[key]
        return found

    def _plain(self, matrix: Matrix) -> nn.Linear:
        """Return `matrix` as a linear map of its own."""
        bias = bias_of(self.model, matrix)
        linear = nn.Linear(
            matrix.in_features, matrix.out_features, bias=bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(weight_of(self.model, matrix), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear
