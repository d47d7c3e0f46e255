"""BitNet b1.58 as it is meant: a model trained with its weights ternary and its tokens INT8.

Ma et al. 2024 (arXiv 2402.17764): each step rounds the weights as `methods.bitnet` does (the scale
is that of the weights as they are now), rounds what linear maps read to INT8 token by token, and
moves the unrounded weights through both roundings by the straight-through estimator
(`methods.straight_through`). Norms and embeddings are trained too, through the type that they are
stored in. BitLinear's own normalisation of its input is not added: the architecture stays the
model's. It starts from the model's weights, or from fresh ones.

What comes out is the artefact of `methods.bitnet`, loaded again and held against the trained model;
or, with a `then`, a GGUF file in llama.cpp's ternary types. Their blocks of 256 weights have a
scale each, so a matrix with one scale is held exactly but for the rounding of the scale to FP16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kernels.errors import ConfigError
from methods.affine import Quantized
from methods.artefact import checkpoint_dtype
from methods.base import Calibration, Matrix, Method, QuantizeReport
from methods.bitnet import BITS, POST_TRAINING, SMALLEST_SCALE, BitNet, ternary
from methods.chained import Chained, hand_on, merged
from methods.engine import TorchEngine, relative_difference
from methods.gguf import Gguf, TypedMatrix
from methods.layers import weight_of
from methods.options import require_flags
from methods.quantization_aware import (
    CHECKED_CROPS,
    EQUALITY_TOLERANCE,
    TOKEN_TOLERANCE,
    EqualityError,
    ReadPlainly,
)
from methods.straight_through import RoundedModel, straight_through
from methods.training import Schedule, fit, next_token_loss, train_at_once

STARTS = ("weights", "scratch")
TERNARY_TYPES = ("TQ1_0", "TQ2_0")

SCALE_TOLERANCE = 2**-10
"""Largest difference of a weight read back from GGUF, over its matrix's scale: FP16 rounds a scale
by 2**-11 of it."""


@dataclass(frozen=True)
class TernarySchedule(Schedule):
    """How long and how fast is trained, and from where.

    Attributes:
        start: `weights`: those of the model; `scratch`: fresh ones.
    """

    start: str = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in STARTS:
            raise ConfigError(
                f"method.training.start is {self.start!r}; it must be weights or scratch"
            )


class TernaryLevels:
    """Ternary weights with the mean magnitude of each matrix as its scale, as it is now."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Nothing is learned beside the weights."""
        return {}

    def rounded(self, matrix: Matrix, weight: Tensor) -> Tensor:
        """Return scale * value, with the gradient of `weight`."""
        values, scale = ternary(weight.detach())
        return straight_through(weight, values.float() * scale)

    def stored(self, matrix: Matrix, weight: Tensor) -> Quantized:
        """Return the values as codes 0, 1, 2 around the zero point 1, with one scale [1, 1]."""
        values, scale = ternary(weight.detach())
        middle = torch.ones(1, 1, dtype=torch.uint8)
        codes = (values + 1).to(torch.uint8)
        return Quantized(codes, scale.reshape(1, 1), middle, 2, matrix.in_features, 0)


@dataclass(frozen=True)
class TrainedBitNet(BitNet):
    """Ternary weights that were trained as such.

    Attributes:
        training: steps, batch, learning rate, and where it starts.
        calibration: the crops that are trained on.
    """

    training: TernarySchedule | None = None
    calibration: Calibration | None = None

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("training", "calibration"):
            if getattr(self, option) is None:
                raise ConfigError(
                    f"method.{option} of {self.name} has no value; method.train=true needs it"
                )

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
        trained, details = self.learn(model, calibration, state, say)
        shown = calibration[:CHECKED_CROPS]
        with torch.no_grad():
            expected = trained.logits(shown)
        report = super().quantize(model, tokenizer, None, into)
        details["equality"] = self._equality(into, shown, expected)
        notes = [note for note in report.notes if note != POST_TRAINING]
        return replace(report, notes=[*notes, *told(details)], details={"training": details})

    def learn(
        self, model: Any, crops: Tensor, state: Path, say: Callable[[str], None]
    ) -> tuple[RoundedModel, dict[str, Any]]:
        """Train `model` in place; return it as it computes, and what a record says of it."""
        schedule = self.training
        assert schedule is not None  # __post_init__ refuses it
        matrices, _ = self.select(model)
        if schedule.start == "scratch":
            _forget(model)
        tokens = self.activation_bits is not None
        dtype = checkpoint_dtype(model)
        model.requires_grad_(True)
        trained = RoundedModel(model, matrices, TernaryLevels(), dtype, tokens)

        def loss(ids: Tensor) -> Tensor:
            return next_token_loss(trained.logits(ids), ids)

        done = fit(trained.parameters(), loss, crops, schedule, state, say, self.name)
        model.requires_grad_(False)
        details = done.details("bitnet", "quantbench", schedule, int(crops.shape[1]))
        return trained, details | {"start": schedule.start, "samples": int(crops.shape[0])}

    def _equality(self, artefact: Path, ids: Tensor, expected: Tensor) -> dict[str, float]:
        tolerance = EQUALITY_TOLERANCE if self.activation_bits is None else TOKEN_TOLERANCE
        engine = self.load(artefact, ReadPlainly())
        difference = relative_difference(engine.prefill(ids)[0], expected)
        engine.close()
        return equality(self.name, difference, tolerance)


@dataclass(frozen=True)
class TernaryGguf(Chained):
    """Ternary weights, trained or not, stored by llama.cpp in one of its ternary types.

    Attributes:
        first: what makes the weights ternary.
    """

    first: BitNet

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.then, Gguf) or self.then.type not in TERNARY_TYPES:
            kind = getattr(self.then, "type", self.then.name)
            raise ConfigError(
                f"method.then of {self.name} is {kind}, which holds other than ternary weights; "
                "choose method@method.then=gguf method.then.type=TQ2_0 (or TQ1_0), or null for "
                "this project's own 1.6 bits"
            )
        if self.first.keep:
            raise ConfigError(
                f"method.keep of {self.name} is {list(self.first.keep)}, but a GGUF file has every "
                "matrix quantized; set method.keep=[], or method.then=null"
            )
        if isinstance(self.first, TrainedBitNet):
            object.__setattr__(self, "calibration", self.first.calibration)

    @property
    def needs_calibration(self) -> bool:
        """Whether it is trained."""
        return self.first.needs_calibration

    @property
    def bits(self) -> float:
        """log2(3): what three values need."""
        return BITS

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return what llama.cpp quantizes.

        Raises:
            ConfigError: a matrix of the blocks would be stored in another type.
        """
        matrices, left_out = super().select(model)
        for matrix in matrices:
            stored = matrix.type if isinstance(matrix, TypedMatrix) else None
            if matrix.role == "block" and stored not in TERNARY_TYPES:
                raise ConfigError(
                    f"layer {matrix.name}: llama.cpp would store its rows of {matrix.in_features} "
                    f"weights as {stored}, and not ternary: rows must be multiples of 256 long, or "
                    "set method.then=null"
                )
        return matrices, left_out

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Make the weights ternary and write the file; nothing is kept of an ended attempt."""
        with tempfile.TemporaryDirectory() as state:
            crops = torch.empty(0, 0) if calibration is None else calibration
            return self.train(model, tokenizer, crops, into, Path(state), lambda text: None)

    def train(
        self,
        model: nn.Module,
        tokenizer: Any,
        calibration: Tensor,
        into: Path,
        state: Path,
        say: Callable[[str], None],
    ) -> QuantizeReport:
        """Train where the first method does, write the file and read it back.

        Raises:
            EqualityError: a weight of the file is not the ternary one.
        """
        self.select(model)
        matrices, _ = self.first.select(model)
        details: dict[str, Any] = {}
        if isinstance(self.first, TrainedBitNet):
            details = {"training": self.first.learn(model, calibration, state, say)[1]}
        wanted = {matrix.name: _make_ternary(weight_of(model, matrix)) for matrix in matrices}
        report = hand_on(self.then, model, tokenizer, None, into, None, say)
        found = self._read_back(into, matrices, wanted)
        training = details.get("training")
        notes = [POST_TRAINING] if training is None else told(training)
        if training is not None:
            training["equality"] = found
        return merged(report, [*notes, *self._notes()], details)

    def _notes(self) -> Sequence[str]:
        return [
            "every block of 256 weights has the scale of its matrix, rounded to FP16: the ternary "
            "values are those of bitnet, read back and compared; llama.cpp rounds activations to "
            "INT8 in blocks of 256, bitnet token by token"
        ]

    def _read_back(
        self, artefact: Path, matrices: Sequence[Matrix], wanted: dict[str, Tensor]
    ) -> dict[str, float]:
        """Return the largest difference of a weight in the file, over its matrix's scale."""
        engine = self.then.load_dequantized(artefact, ReadPlainly())  # type: ignore[attr-defined]
        if not isinstance(engine, TorchEngine):
            raise TypeError(f"{self.then.name} is read by no PyTorch model")
        most = 0.0
        for matrix in matrices:
            expected = wanted[matrix.name]
            difference = (weight_of(engine.model, matrix) - expected).abs().max()
            most = max(most, float(difference / expected.abs().max().clamp_min(SMALLEST_SCALE)))
        engine.close()
        return equality(self.name, most, SCALE_TOLERANCE)


def equality(owner: str, difference: float, tolerance: float) -> dict[str, float]:
    """Return both for the record.

    Raises:
        EqualityError: the difference is above the tolerance, or NaN.
    """
    if not difference <= tolerance:
        raise EqualityError(
            f"the artefact of {owner} is not the model that was made: they differ by "
            f"{difference:.3g}; {tolerance:.3g} is tolerated"
        )
    return {"difference": difference, "tolerance": tolerance}


def told(training: dict[str, Any]) -> list[str]:
    """Return what a reader of the row must know of the training."""
    start = "fresh weights" if training["start"] == "scratch" else "the model's weights"
    return [
        f"trained with ternary weights from {start}: {training['steps']} steps of "
        f"{training['batch']} x {training['seq_len']} tokens on {training['samples']} crops of the "
        f"calibration text ({training['seconds']:.0f} s); it has learned that text too, so text of "
        "the same kind flatters its perplexity beside methods that do not train"
    ]


@torch.no_grad()
def _make_ternary(weight: Tensor) -> Tensor:
    """Round `weight` in place to scale * -1, 0 or 1; return a copy."""
    values, scale = ternary(weight)
    weight.copy_(values.float() * scale)
    return weight.clone()


@torch.no_grad()
def _forget(model: Any) -> None:
    """Give `model` the fresh weights of its architecture, drawn with a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = AutoModelForCausalLM.from_config(model.config)
    for name, parameter in fresh.named_parameters():
        model.get_parameter(name).copy_(parameter)


def bitnet(
    name: str,
    activation_bits: int | None,
    keep: Sequence[str],
    train: bool,
    training: TernarySchedule,
    calibration: Calibration,
    then: Method | None,
) -> Method:
    """Return the method that the options of `conf/method/bitnet.yaml` ask for.

    Raises:
        ConfigError: `train` is neither true nor false, or see the classes.
    """
    require_flags(name, {"train": train})
    first = (
        TrainedBitNet(name, activation_bits, keep, training, calibration)
        if train
        else BitNet(name, activation_bits, keep)
    )
    # A property may stand for the protocol's class variable; a checker cannot know.
    return first if then is None else cast(Method, TernaryGguf(name, then, first))
