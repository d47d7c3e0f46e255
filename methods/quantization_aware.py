"""What `qat` and `lsq` share: training a model rounded, storing it, checking that it is the same.

The loss is the cross entropy of the next token and, with `distill`, that many times the mean
KL(unquantized || rounded) over the same tokens, both in nats. Dropout is off. All parameters are
trained: the matrices through their rounding, the others through the type they are stored in, so
that the artefact is the trained model and not near it. It is written, loaded again by the loading
code of every row, and must answer as the trained model does (`check_equality`).
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.artefact import checkpoint_dtype
from methods.base import Calibration, Engine, Hardware, Matrix, QuantizeReport
from methods.engine import relative_difference
from methods.options import names
from methods.rtn import RTN
from methods.straight_through import RoundedModel, WeightRounding
from methods.training import (
    Schedule,
    divergence_loss,
    fit,
    next_token_loss,
    train_at_once,
)

PRECISIONS = ("float32", "bfloat16")
CHECKED_CROPS = 4
LARGEST_DISTILL = 1000

EQUALITY_TOLERANCE = 0.001
"""Largest difference of the logits of artefact and trained model, root mean square over that of the
logits, with weights dequantized and float32 activations: the sums are the same but for their order,
1e-7 to 1e-6. A weight stored one code off gives more than 0.001 on the smallest models."""

TOKEN_TOLERANCE = 0.02
"""The same where tokens are rounded to INT8: a last bit decides now and then which code an input
gets, and that changes what follows."""


class EqualityError(RuntimeError):
    """The written artefact does not answer as the model that was trained."""


@dataclass(frozen=True)
class ReadPlainly:
    """A processor that computes in float32: `methods.base.Hardware`."""

    device: str = "cpu"
    compute_dtype: str = "float32"
    usable_threads: int = 1
    gpu_layers: int | None = None
    allow_fallback: bool = True
    offload: str | None = None
    resident_bytes: int = 0
    decode: str = "model"


@dataclass(frozen=True)
class QuantizationAware(ABC):
    """Options of a method that trains a model while its weights are rounded.

    Attributes:
        bits, group_size, scale_dtype, on_indivisible, keep: as for `methods.rtn.RTN`.
        activation_bits: of the tokens that linear maps read, in training and after it: None
            (floating point) or 8.
        training: steps, batch, learning rate.
        distill: weight of the divergence from the unquantized model; 0 is off.
        precision: of the products in training: `float32`, or `bfloat16` by autocast.
        calibration: the crops that are trained on.
    """

    name: str
    bits: int
    group_size: int
    training: Schedule
    calibration: Calibration
    scale_dtype: str = "float16"
    activation_bits: int | None = None
    distill: float = 0.0
    precision: str = "float32"
    keep: tuple[str, ...] = ()
    on_indivisible: str = "error"

    needs_calibration: ClassVar[bool] = True
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", names(self.keep))
        # The options of the stored format are checked here, before any weight is loaded.
        _ = self.format
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"method.precision of {self.name} is {self.precision!r}; it must be 'float32' or "
                "'bfloat16'"
            )
        weight = self.distill if isinstance(self.distill, int | float) else -1
        if isinstance(self.distill, bool) or not 0 <= weight <= LARGEST_DISTILL:
            raise ConfigError(
                f"method.distill of {self.name} is {self.distill!r}; it must be a weight from 0 "
                f"(off) to {LARGEST_DISTILL}"
            )

    @property
    def format(self) -> RTN:
        """How weights are stored and loaded: as those of `methods.rtn`."""
        return RTN(
            self.name,
            self.bits,
            self.group_size,
            symmetric=self.stored_symmetric,
            scale_dtype=self.scale_dtype,
            keep=self.keep,
            on_indivisible=self.on_indivisible,
            activation_bits=self.activation_bits,
        )

    @property
    @abstractmethod
    def stored_symmetric(self) -> bool:
        """Whether the stored weights have no zero points."""

    @property
    def trained_with(self) -> str:
        """What rounds in training: this project or a library."""
        return "quantbench"

    @property
    def rounds_in_training(self) -> bool:
        """Whether what is trained is the rounded model."""
        return True

    @property
    def path_tolerance(self) -> float:
        """Largest difference of the packed and the dequantized path, see `methods.rtn`."""
        return self.format.path_tolerance

    @abstractmethod
    def rounding(self, model: nn.Module, matrices: list[Matrix]) -> WeightRounding:
        """Return how the weights of `model` are rounded; it may exchange modules of `model`."""

    def check(self, hardware: Hardware) -> None:
        """Refuse what round-to-nearest refuses on this hardware."""
        self.format.check(hardware)

    def stored_bits(self, matrix: Matrix) -> int:
        """Bits of the packed weights, scales and zero points of `matrix`, padding included."""
        return self.format.stored_bits(matrix)

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return what is quantized and what is left."""
        return self.format.select(model)

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Do what `train` does, with nothing kept of an attempt that was ended."""
        return train_at_once(self, self.name, model, tokenizer, calibration, into)

    def train(
        self,
        model: nn.Module,
        tokenizer: Any,
        calibration: Tensor,
        into: Path,
        state: Path,
        say: Callable[[str], None],
    ) -> QuantizeReport:
        """Train `model` on `calibration`, int64 [samples, T], store it, check that it is the same.

        Raises:
            ConfigError: see `select`, `methods.training.fit`.
            EqualityError: the artefact is not the trained model.
        """
        matrices, _ = self.select(model)
        dtype = checkpoint_dtype(model)
        teacher = copy.deepcopy(model).requires_grad_(False) if self.distill else None
        rounding = self.rounding(model, matrices)
        tokens = self.activation_bits is not None
        trained = RoundedModel(model.requires_grad_(True), matrices, rounding, dtype, tokens)

        def loss(ids: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
                logits = trained.logits(ids)
                target = None if teacher is None else teacher(input_ids=ids, use_cache=False).logits
            found = next_token_loss(logits, ids)
            return (
                found if target is None else found + self.distill * divergence_loss(logits, target)
            )

        parameters = trained.parameters()
        done = fit(parameters, loss, calibration, self.training, state, say, self.name)
        details = done.details(
            self.kind, self.trained_with, self.training, int(calibration.shape[1])
        )
        shown = calibration[:CHECKED_CROPS]
        with torch.no_grad():
            expected = trained.logits(shown)
        model.requires_grad_(False)
        report = self.format.store(model, into, trained.stored)
        if self.rounds_in_training:
            details["equality"] = self.equality(into, shown, expected)
        return dataclasses.replace(
            report, notes=[*report.notes, *self.told(details)], details={"training": details}
        )

    def equality(self, artefact: Path, ids: Tensor, expected: Tensor) -> dict[str, float]:
        """Return how far the logits of `artefact` on `ids` are from `expected`, and what may be.

        Raises:
            EqualityError: they are further than that.
        """
        tolerance = EQUALITY_TOLERANCE if self.activation_bits is None else TOKEN_TOLERANCE
        engine = self.load_dequantized(artefact, ReadPlainly())
        difference = relative_difference(engine.prefill(ids)[0], expected.float())
        engine.close()
        # Written so that NaN, too, is a disagreement.
        if not difference <= tolerance:
            raise EqualityError(
                f"the artefact of {self.name} is not the model that was trained: their logits "
                f"differ by {difference:.3g} of their size; {tolerance:.3g} is tolerated"
            )
        return {"difference": difference, "tolerance": tolerance}

    def told(self, details: dict[str, Any]) -> list[str]:
        """Return what a reader of the row must know of the training."""
        samples, seq_len = self.calibration.samples, self.calibration.seq_len
        how = "" if self.rounds_in_training else "trained without rounding, rounded at the end; "
        return [
            f"{how}trained for {details['steps']} steps of {details['batch']} x {seq_len} tokens "
            f"on {samples} crops of the calibration text ({details['tokens_seen']} tokens read, "
            f"{details['seconds']:.0f} s): it has learned that text too, so text of the same kind "
            "flatters its perplexity beside methods that do not train"
        ]

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load for `hardware` on its packed kernels where it has them."""
        return self.format.load(artefact, hardware)

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load for `hardware` with every matrix dequantized at each call, to compare with."""
        return self.format.load_dequantized(artefact, hardware)
