"""Pruning, then quantizing: the smallest weights of a model become zero, the rest is rounded.

Magnitude pruning (Han et al. 2015, arXiv 1506.02626): `unstructured` removes the share `amount` of
each matrix, or of all of them together, as `torch.nn.utils.prune.l1_unstructured` and
`global_unstructured` do; `2:4` removes the two smaller ones of every four inputs (Mishra et al.
2021, arXiv 2104.08378). The matrices are those that the method after it covers. Nothing is trained
afterwards.

What that saves depends on how zeros are stored. In a dense format a zero takes what any weight
takes. With `store: bitmap` the file holds one bit a weight and the codes that are not zero
(`methods.sparse`); running takes what dense weights take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods import sparse
from methods.base import Engine, Hardware, LayerwiseMethod, Matrix, QuantizeReport
from methods.chained import Chained, hand_on, merged
from methods.engine import TorchEngine
from methods.layers import check_finite, weight_of
from methods.linear import Layout
from methods.packed import load_engine
from methods.quantization_aware import ReadPlainly

Pattern = Literal["unstructured", "2:4"]
PATTERNS = ("unstructured", "2:4")
SCOPES = ("matrix", "global")
STORES = ("dense", "bitmap")

AMOUNT = 0.3
"""The share that the documents remove."""

OF_FOUR, KEPT_OF_FOUR = 4, 2
UNITS_AT_ONCE = 256


@dataclass(frozen=True)
class PruneQuant(Chained):
    """Magnitude pruning before another method.

    Attributes:
        name, then: see `methods.chained.Chained`.
        pattern: `unstructured`, or `2:4`.
        amount: share of the weights that `unstructured` removes, above 0 and below 1; None: 0.3.
        scope: whether the smallest are those of each `matrix`, or of all matrices (`global`).
        store: `dense`: as the method after it stores them; `bitmap`: without the zeros.
    """

    pattern: str = "unstructured"
    amount: float | None = None
    scope: str = "matrix"
    store: str = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, known in (("pattern", PATTERNS), ("scope", SCOPES), ("store", STORES)):
            if getattr(self, option) not in known:
                raise ConfigError(
                    f"method.{option} of {self.name} is {getattr(self, option)!r}; it must be "
                    f"{' or '.join(known)}"
                )
        if self.pattern == "2:4":
            self._check_two_of_four()
        elif self.amount is not None and not _is_share(self.amount):
            raise ConfigError(
                f"method.amount of {self.name} is {self.amount!r}; it must be above 0 and below 1, "
                "the share of weights that become zero"
            )
        if self.store == "bitmap":
            self._check_bitmap()

    def _check_two_of_four(self) -> None:
        for option, given in (("amount", self.amount is not None), ("scope", self.is_global)):
            if given:
                raise ConfigError(
                    f"method.{option} of {self.name} is {getattr(self, option)!r}, but pattern=2:4 "
                    "removes two of every four weights and has no such option; leave it out, or "
                    "set method.pattern=unstructured"
                )

    def _check_bitmap(self) -> None:
        then: Any = self.then
        library = getattr(then, "kernel", "quantbench") != "quantbench"
        rounds = getattr(then, "activation_bits", None) is not None
        packs = isinstance(then, LayerwiseMethod)
        if library or rounds or not packs:
            why = " with kernel=library" if library else " with activation_bits" if packs else ""
            raise ConfigError(
                f"method.store=bitmap of {self.name} takes weights that are packed as this project "
                f"packs them, and {then.name}{why} stores others; choose method@method.then=rtn, "
                "or method.store=dense"
            )
        object.__setattr__(self, "load_dequantized", self._load_dequantized)

    @property
    def is_global(self) -> bool:
        """Whether all matrices are pruned together."""
        return self.scope == "global"

    @property
    def share(self) -> float:
        """The share of weights that is removed."""
        if self.pattern == "2:4":
            return 1 - KEPT_OF_FOUR / OF_FOUR
        return AMOUNT if self.amount is None else self.amount

    def stored_bits(self, matrix: Matrix) -> int:
        """Return the bits for `matrix`; with a bitmap at most so many: more weights round to 0."""
        dense = super().stored_bits(matrix)
        affine = getattr(self.then, "affine", None)
        if self.store == "dense" or affine is None:
            return dense
        layout = Layout.of(matrix, affine)
        # Experts are pruned one by one.
        single = matrix.out_features * matrix.in_features
        kept = matrix.count * (single - removed(single, self.share))
        return sparse.stored_bits(layout, kept)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return what the method after it covers, and what it leaves.

        Raises:
            ConfigError: rows are no multiple of four long, for 2:4.
        """
        matrices, left_out = super().select(model)
        for matrix in matrices:
            if self.pattern == "2:4" and matrix.in_features % OF_FOUR:
                raise ConfigError(
                    f"layer {matrix.name}: its width {matrix.in_features} is not a multiple of 4, "
                    "which pattern=2:4 needs; set method.pattern=unstructured"
                )
        return matrices, left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Prune `model` in place and let the method after it write the artefact."""
        return self._made(model, tokenizer, calibration, into, None, _unheard)

    def train(
        self,
        model: nn.Module,
        tokenizer: Any,
        calibration: Tensor,
        into: Path,
        state: Path,
        say: Callable[[str], None],
    ) -> QuantizeReport:
        """Do the same where the method after it is shown text, and may train."""
        return self._made(model, tokenizer, calibration, into, state, say)

    def _made(
        self,
        model: nn.Module,
        tokenizer: Any,
        calibration: Tensor | None,
        into: Path,
        state: Path | None,
        say: Callable[[str], None],
    ) -> QuantizeReport:
        matrices, _ = self.select(model)
        say("pruning")
        self.prune(model, matrices)
        report = hand_on(self.then, model, tokenizer, calibration, into, state, say)
        weights = sum(matrix.weights for matrix in report.quantized)
        dense = report.stored_bits / weights
        if self.store == "bitmap":
            report = replace(report, stored_bits=sum(sparse.compress(into).values()))
        zeros = self._zeros(into, report.quantized)
        facts = {
            "pattern": self.pattern,
            "amount": self.share,
            "scope": self.scope,
            "zeros": zeros,
            "stored": self.store,
            "bits_per_weight_dense": dense,
            "bits_per_weight": report.stored_bits / weights,
        }
        return merged(report, self._notes(zeros), {"pruning": facts})

    def _notes(self, zeros: float | None) -> list[str]:
        """Return what was done before the other method, and what of it is left."""
        together = " of all matrices together" if self.is_global else " of each matrix"
        what = "two of every four" if self.pattern == "2:4" else f"{self.share:.0%}{together}"
        notes = [f"pruned by magnitude before {self.then.name}: {what}; not trained afterwards"]
        if zeros is None:
            notes.append(f"zeros of {self.then.name} are not counted: it runs no PyTorch module")
        else:
            kept = ", fewer than were made" if zeros < self.share - 1e-3 else ""
            notes.append(f"{zeros:.1%} of the stored weights are zero{kept}")
        if self.store == "dense":
            notes.append("zeros are stored as any weight is: pruning saves no bytes here")
        else:
            notes.append(
                "the file holds a bitmap and the codes that are not zero; memory, kernels and "
                "speed are those of dense weights"
            )
        return notes

    def prune(self, model: nn.Module, matrices: Sequence[Matrix]) -> None:
        """Make the smallest weights of `matrices` zero, in place."""
        views = list(_single_matrices(model, matrices))
        if self.pattern == "2:4":
            for view in views:
                _keep_two_of_four(view)
        elif self.is_global:
            _remove_smallest(views, self.share)
        else:
            for view in views:
                _remove_smallest([view], self.share)

    def _zeros(self, artefact: Path, matrices: Sequence[Matrix]) -> float | None:
        """Return the share of zeros in what was stored; None where that cannot be looked at."""
        loader = getattr(self, "load_dequantized", self.load)
        engine = loader(artefact, ReadPlainly())
        try:
            return share_of_zeros(engine, matrices)
        finally:
            engine.close()

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the artefact as the method after it does, zeros put back first."""
        if self.store == "bitmap":
            return load_engine(artefact, hardware, True, sparse.build)
        return super().load(artefact, hardware)

    def _load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        return load_engine(artefact, hardware, False, sparse.build)


def _unheard(_: str) -> None:
    """Say nothing."""


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


def removed(weights: int, share: float) -> int:
    """Return how many of `weights` are removed: `round`, as `torch.nn.utils.prune` has it."""
    return round(share * weights)


def _single_matrices(model: nn.Module, matrices: Sequence[Matrix]) -> Iterator[Tensor]:
    """Yield each matrix as a view [out, in]; the experts of a stack one by one.

    Raises:
        ConfigError: a weight is not finite.
    """
    for matrix in matrices:
        weight = weight_of(model, matrix)
        check_finite(matrix.name, weight)
        yield from weight if matrix.count > 1 else [weight]


@torch.no_grad()
def _remove_smallest(views: Sequence[Tensor], share: float) -> None:
    """Make the share of least magnitude of all `views` together zero, in place."""
    magnitudes = torch.cat([view.abs().flatten() for view in views])
    count = removed(magnitudes.numel(), share)
    gone = torch.zeros(magnitudes.shape, dtype=torch.bool)
    gone[magnitudes.topk(count, largest=False).indices] = True
    begin = 0
    for view in views:
        view.masked_fill_(gone[begin : begin + view.numel()].view(view.shape), 0)
        begin += view.numel()


@torch.no_grad()
def _keep_two_of_four(view: Tensor) -> None:
    """Make the two of least magnitude in every four inputs of [out, in] zero, in place."""
    fours = view.abs().reshape(view.shape[0], -1, OF_FOUR)
    least = fours.topk(OF_FOUR - KEPT_OF_FOUR, dim=-1, largest=False).indices
    gone = torch.zeros(fours.shape, dtype=torch.bool).scatter_(-1, least, True)
    view.masked_fill_(gone.view(view.shape), 0)


@torch.no_grad()
def share_of_zeros(engine: Engine, matrices: Sequence[Matrix]) -> float | None:
    """Return the share of the weights of `matrices` that `engine` multiplies by as zero.

    Found with unit vectors, so it is what runs and needs to know no format. None for an engine that
    is no PyTorch model.
    """
    if not isinstance(engine, TorchEngine):
        return None
    zeros = 0
    for matrix in matrices:
        owner, _, attribute = matrix.name.rpartition(".")
        module = getattr(engine.model.get_submodule(owner), attribute)
        if matrix.count > 1:
            zeros += sum(int((module[expert] == 0).sum()) for expert in range(matrix.count))
            continue
        size = matrix.out_features if matrix.role == "embedding" else matrix.in_features
        for begin in range(0, size, UNITS_AT_ONCE):
            end = min(begin + UNITS_AT_ONCE, size)
            zeros += _zeros_at(module, matrix, begin, end)
    return zeros / sum(matrix.weights for matrix in matrices)


def _zeros_at(module: Any, matrix: Matrix, begin: int, end: int) -> int:
    """Return how many zeros the inputs (rows of an embedding) from `begin` to `end` have."""
    if matrix.role == "embedding":
        return int((module(torch.arange(begin, end)) == 0).sum())
    units = torch.zeros(end - begin + 1, matrix.in_features)
    units[1:, begin:end] = torch.eye(end - begin)
    # The first row reads nothing and gives the bias.
    found = module(units)
    return int((found[1:] == found[0]).sum())
