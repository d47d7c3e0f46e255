"""Distilling, then quantizing: a student of fewer blocks learns the teacher's logits.

Hinton et al. 2015 (arXiv 1503.02531): the loss of a token is `alpha` of temperature**2 times
KL(teacher || student), both softened by the temperature, and 1 - alpha of the cross entropy. As in
DistilBERT (Sanh et al. 2019, arXiv 1910.01108) the student is the teacher with fewer blocks and
begins as evenly spaced ones of it, the first and the last among them; embeddings, norms and head
are copied. Everything is trained in float32.

The row is the student's: its weights, size and kernels. Divergence and perplexity are held against
the teacher, as every row is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kernels.errors import ConfigError
from methods.base import Calibration, QuantizeReport
from methods.chained import Chained, calibration_of, check_crops, hand_on, merged
from methods.layers import decoder_blocks, is_tied
from methods.training import (
    Schedule,
    divergence_loss,
    fit,
    next_token_loss,
    train_at_once,
)

LAYERS_FIELD = "num_hidden_layers"
"""What transformers' configurations call the number of blocks, whatever their files do."""

PER_LAYER = ("layer_types", "attention_layers")
"""Lists of a configuration with an entry for each block."""

COMPARED_CROPS = 16
"""Crops on which the loss is taken before and after."""


@dataclass(frozen=True)
class DistillQuant(Chained):
    """A student of fewer blocks, then another method.

    Attributes:
        name, then: see `methods.chained.Chained`.
        training: steps, batch, learning rate.
        calibration: the crops that are trained on.
        blocks: how many the student has; below 1: that share of the teacher's.
        temperature: that softens both.
        alpha: share of the divergence in the loss; the rest is cross entropy.
    """

    training: Schedule
    calibration: Calibration
    blocks: float = 0.5
    temperature: float = 2.0
    alpha: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, good, wanted in (
            ("blocks", _is_count_or_share(self.blocks), "a whole number, or a share below 1"),
            ("temperature", _between(self.temperature, 0.1, 100), "from 0.1 to 100"),
            ("alpha", _between(self.alpha, 0, 1), "from 0 (cross entropy alone) to 1"),
        ):
            if not good:
                raise ConfigError(
                    f"method.{option} of {self.name} is {getattr(self, option)!r}; it must be "
                    f"{wanted}"
                )
        if self.then.needs_calibration:
            own = self.calibration
            wanted_crops: Calibration = self.then.calibration  # type: ignore[attr-defined]
            check_crops(wanted_crops, own.samples, own.seq_len, self.name)

    @property
    def needs_calibration(self) -> bool:
        """It trains on text."""
        return True

    def handed_on(self, model: Any) -> Any:
        """Return the student's shape, on meta."""
        return empty_student(model, self.layers(model))

    def layers(self, model: nn.Module) -> list[int]:
        """Return the blocks of the teacher that the student begins as.

        Raises:
            ConfigError: they would be no fewer than the teacher's, or none.
        """
        _, blocks = decoder_blocks(model)
        count = round(self.blocks * len(blocks)) if self.blocks < 1 else int(self.blocks)
        if not 1 <= count < len(blocks):
            raise ConfigError(
                f"method.blocks of {self.name} is {self.blocks}, which is {count} blocks, and the "
                f"model has {len(blocks)}; a student has fewer than its teacher, and at least 1"
            )
        return evenly(len(blocks), count)

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
        """Train a student of `model` on `calibration`, int64 [samples, T], and hand it on."""
        layers = self.layers(model)
        shown = calibration_of(self.then, calibration, self.name)
        student = student_of(model, layers)
        model.requires_grad_(False)
        facts: dict[str, Any] = {
            "teacher_parameters": _size(model),
            "student_parameters": _size(student),
            "layers": layers,
            "temperature": self.temperature,
            "alpha": self.alpha,
        }

        def loss(ids: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = model(input_ids=ids, use_cache=False).logits
            found = student(input_ids=ids, use_cache=False).logits
            return self._loss(found, wanted, ids)

        compared = calibration[:COMPARED_CROPS]
        facts["loss_before"] = _mean_loss(loss, compared)
        parameters = dict(student.named_parameters())
        done = fit(parameters, loss, calibration, self.training, state, say, self.name)
        facts["loss_after"] = _mean_loss(loss, compared)
        student.requires_grad_(False)
        trained = done.details(
            "distillation", "quantbench", self.training, int(calibration.shape[1])
        )
        report = hand_on(self.then, student, tokenizer, shown, into, state, say)
        details = {"training": trained, "distillation": facts}
        return merged(report, self._notes(facts, trained), details)

    def _loss(self, found: Tensor, wanted: Tensor, ids: Tensor) -> Tensor:
        """Return the loss, nats, of the logits [B, T, V] of student and teacher."""
        heat = self.temperature
        divergence = heat**2 * divergence_loss(found / heat, wanted / heat)
        return self.alpha * divergence + (1 - self.alpha) * next_token_loss(found, ids)

    def _notes(self, facts: dict[str, Any], training: dict[str, Any]) -> list[str]:
        chosen = ", ".join(str(layer) for layer in facts["layers"])
        return [
            f"a student of {facts['student_parameters']:,} parameters, begun as blocks {chosen} of "
            f"a teacher of {facts['teacher_parameters']:,}, trained on its logits for "
            f"{training['steps']} steps of {training['batch']} x {training['seq_len']} tokens of "
            f"the calibration text ({training['seconds']:.0f} s), then {self.then.name}: it has "
            "learned that text too"
        ]


def _between(value: object, least: float, most: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and least <= value <= most  # type: ignore[operator]


def _is_count_or_share(value: object) -> bool:
    number = _between(value, 0, 1 << 16) and value != 0
    return number and (value < 1 or float(value).is_integer())  # type: ignore[operator,arg-type]


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _mean_loss(loss: Callable[[Tensor], Tensor], crops: Tensor) -> float:
    """Return the mean of `loss` over `crops`, one at a time."""
    return sum(float(loss(crop[None])) for crop in crops) / crops.shape[0]


def evenly(blocks: int, count: int) -> list[int]:
    """Return `count` of `blocks` numbers from 0, evenly spaced, the first and the last included."""
    if count == 1:
        return [0]
    return [round(place * (blocks - 1) / (count - 1)) for place in range(count)]


def empty_student(teacher: Any, layers: Sequence[int]) -> Any:
    """Return the model with `layers` of the teacher's blocks, parameters on meta.

    Raises:
        ConfigError: the configuration does not say how many blocks there are in a known way.
    """
    prefix, blocks = decoder_blocks(teacher)
    config = copy.deepcopy(teacher.config)
    kind = type(teacher).__name__
    if getattr(config, LAYERS_FIELD, None) != len(blocks):
        raise ConfigError(
            f"{kind} has {len(blocks)} blocks in {prefix}, and its configuration does not say so "
            f"as {LAYERS_FIELD}; only such models can be distilled into fewer blocks"
        )
    setattr(config, LAYERS_FIELD, len(layers))
    for name in PER_LAYER:
        listed = getattr(config, name, None)
        if isinstance(listed, list | tuple) and len(listed) == len(blocks):
            setattr(config, name, [listed[layer] for layer in layers])
    with init_empty_weights(include_buffers=False):
        student = AutoModelForCausalLM.from_config(config)
    if is_tied(teacher):
        # Making parameters empty has separated those that are one.
        student.tie_weights()
    found = decoder_blocks(student)
    if (found[0], len(found[1])) != (prefix, len(layers)):
        raise ConfigError(
            f"{kind} with {len(layers)} blocks is built otherwise than with {len(blocks)}; it "
            "cannot be distilled into fewer blocks"
        )
    return student.eval()


def student_of(teacher: Any, layers: Sequence[int]) -> Any:
    """Return the student in float32 with the teacher's weights, its own copies, to be trained.

    Raises:
        ConfigError: the blocks of the teacher are not alike, so that one cannot be another.
    """
    student = empty_student(teacher, layers)
    prefix, _ = decoder_blocks(teacher)
    places = {layer: place for place, layer in enumerate(layers)}
    copied: dict[str, Tensor] = {}
    for name, tensor in teacher.state_dict().items():
        if name.startswith(f"{prefix}."):
            number, _, rest = name[len(prefix) + 1 :].partition(".")
            if int(number) not in places:
                continue
            name = f"{prefix}.{places[int(number)]}.{rest}"
        copied[name] = tensor.detach().float().clone()
    try:
        student.load_state_dict(copied, strict=True, assign=True)
    except RuntimeError as error:
        raise ConfigError(
            f"the blocks of {type(teacher).__name__} are not alike: with {len(layers)} of them the "
            "weights do not fit; it cannot be distilled into fewer blocks"
        ) from error
    if is_tied(teacher):
        student.tie_weights()
    return student.requires_grad_(True)
