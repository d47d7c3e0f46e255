"""What methods share that change the model and hand it on to another one, their field `then`.

The artefact is the other method's, in its format; its size, its loading and its kernels are those
of that method, and what it can do beyond `methods.base.Method` (two paths, several ways of loading)
the whole can do, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.base import (
    AdoptingMethod,
    Calibration,
    Engine,
    ForeseeingMethod,
    Hardware,
    Matrix,
    Method,
    QuantizeReport,
    TrainingMethod,
)

HANDED_ON = (
    "calibration",
    "keeps_ties",
    "load_as",
    "load_dequantized",
    "loadings",
    "path_tolerance",
    "rest_dtype",
)
"""What a method may have beyond the protocol `Method` and not have; `isinstance` asks for it."""


@dataclass(frozen=True)
class Chained:
    """A method that hands its model on.

    Attributes:
        name: as tables show it.
        then: the method that the changed model is given to.
    """

    name: str
    then: Method

    def __post_init__(self) -> None:
        if not hasattr(self.then, "quantize"):
            raise ConfigError(
                f"method.then of {self.name} is {self.then!r}; it is chosen among the methods, as "
                "in method@method.then=rtn"
            )
        if isinstance(self.then, AdoptingMethod):
            raise ConfigError(
                f"method.then of {self.name} is {self.then.name}, which measures what is quantized "
                "already; choose a method that quantizes, as in method@method.then=rtn"
            )
        # Set on the object, so that a chain has exactly what the method at its end has.
        for name in HANDED_ON:
            if not hasattr(self, name) and hasattr(self.then, name):
                object.__setattr__(self, name, getattr(self.then, name))
        if isinstance(self.then, ForeseeingMethod):
            object.__setattr__(self, "foresee", self._foresee)

    @property
    def needs_calibration(self) -> bool:
        """Whether the method at the end is shown text."""
        return self.then.needs_calibration

    @property
    def bits(self) -> float | None:
        """Those of the method at the end."""
        return self.then.bits

    @property
    def group_size(self) -> int | None:
        """That of the method at the end."""
        return self.then.group_size

    def check(self, hardware: Hardware) -> None:
        """Refuse what the method at the end refuses."""
        self.then.check(hardware)

    def handed_on(self, model: Any) -> Any:
        """Return the model that the method at the end is given: this one, or another shape."""
        return model

    def _foresee(self, model: nn.Module) -> list[str]:
        then = self.then
        return then.foresee(self.handed_on(model)) if isinstance(then, ForeseeingMethod) else []

    def stored_bits(self, matrix: Matrix) -> int:
        """Return the bits that the method at the end stores for `matrix`."""
        return self.then.stored_bits(matrix)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return what the method at the end covers of `handed_on(model)`, and what it leaves."""
        return self.then.select(self.handed_on(model))

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the artefact as the method at the end does."""
        return self.then.load(artefact, hardware)


def hand_on(
    then: Method,
    model: nn.Module,
    tokenizer: Any,
    calibration: Tensor | None,
    into: Path,
    state: Path | None,
    say: Callable[[str], None],
) -> QuantizeReport:
    """Let `then` write the artefact of `model`; it trains where it does and there is a `state`."""
    if state is not None and isinstance(then, TrainingMethod) and calibration is not None:
        folder = state / "then"
        folder.mkdir(parents=True, exist_ok=True)
        return then.train(model, tokenizer, calibration, into, folder, say)
    say(f"quantizing: {then.name}")
    return then.quantize(model, tokenizer, calibration, into)


def merged(
    report: QuantizeReport, before: Sequence[str], details: Mapping[str, Any]
) -> QuantizeReport:
    """Return the inner method's `report` with what was done before it, notes and details first.

    Details of the same name (both trained) go below `then`. The row is not the unquantized one.
    """
    inner = {name: value for name, value in report.details.items() if name not in details}
    hidden = {name: value for name, value in report.details.items() if name in details}
    joined = {**details, **inner, **({"then": hidden} if hidden else {})}
    return replace(report, notes=[*before, *report.notes], details=joined, unquantized=None)


def calibration_of(then: Method, crops: Tensor, owner: str) -> Tensor | None:
    """Return what `then` is shown, int64 [samples, seq_len], of the training crops; None for none.

    Raises:
        ConfigError: it wants more or longer texts than `owner` trains on.
    """
    if not then.needs_calibration:
        return None
    wanted: Calibration = then.calibration  # type: ignore[attr-defined]  # methods that need it have it
    check_crops(wanted, crops.shape[0], crops.shape[1], owner)
    return crops[: wanted.samples, : wanted.seq_len].contiguous()


def check_crops(wanted: Calibration, samples: int, seq_len: int, owner: str) -> None:
    """Raise ConfigError where `owner`'s crops are fewer or shorter than `wanted`."""
    for field, least, there in (
        ("samples", wanted.samples, samples),
        ("seq_len", wanted.seq_len, seq_len),
    ):
        if least > there:
            raise ConfigError(
                f"method.then.calibration.{field} is {least}, but {owner} has {there} "
                f"(method.calibration.{field}) to train on and to show; make the first smaller or "
                "the second larger"
            )
