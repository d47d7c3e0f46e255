"""Training that can be ended at any moment and goes on where it was: AdamW over crops of a text.

AdamW is Loshchilov and Hutter 2019 (arXiv 1711.05101); the learning rate rises linearly over
`warmup` steps and falls to zero along a cosine. Decay is for matrices alone.

Step i reads a batch that depends on i alone (`batch_at`), nothing is drawn at random, and the state
is one whole file (`state.safetensors`: weights, moments; the rest as JSON in its header). So a run
that was killed and started again takes the same steps as one that was not, bit for bit where
PyTorch's own sums are (float32, the same number of threads). A file that is damaged or of another
run is left unread, and said.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from kernels.errors import ConfigError
from methods.base import QuantizeReport, TrainingMethod
from methods.options import need_calibration

STATE = "state.safetensors"
FORMAT = 1
KEEP_SECONDS = 30.0
SAY_SECONDS = 5.0
CURVE_POINTS = 100
BETAS = (0.9, 0.95)
LARGEST_BATCH = 1 << 16


@dataclass(frozen=True)
class Schedule:
    """How long and how fast is trained; the field `training` of a method that trains.

    Attributes:
        steps: of the optimizer.
        batch: crops a step.
        learning_rate: the highest.
        warmup: steps over which it rises to that.
        weight_decay: of AdamW, on matrices.
        clip: largest norm of all gradients together; longer ones are shortened to it.

    Raises:
        ConfigError: a figure is outside what makes sense.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float

    def __post_init__(self) -> None:
        ranges = {
            "steps": (int, 1, math.inf, "a whole number of 1 or more"),
            "batch": (int, 1, LARGEST_BATCH, f"a whole number from 1 to {LARGEST_BATCH}"),
            "learning_rate": (float, 1e-12, 1.0, "above 0, at most 1"),
            "warmup": (int, 0, math.inf, "a whole number of 0 or more"),
            "weight_decay": (float, 0.0, 1.0, "from 0 to 1"),
            "clip": (float, 1e-12, math.inf, "above 0"),
        }
        for name, (kind, least, most, wanted) in ranges.items():
            value = getattr(self, name)
            number = isinstance(value, int) or (kind is float and isinstance(value, float))
            if isinstance(value, bool) or not number or not least <= value <= most:
                raise ConfigError(f"method.training.{name} is {value!r}; it must be {wanted}")
        if self.warmup >= self.steps:
            raise ConfigError(
                f"method.training.warmup is {self.warmup} steps of {self.steps}; it must be fewer "
                "than method.training.steps"
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of step `step`, the first being 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        share = (step - self.warmup) / (self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Fit:
    """What a training did.

    Attributes:
        curve: (steps taken, mean loss in nats since the point before), about a hundred points.
        seconds: spent on steps, all attempts together.
        resumed_at: steps that were taken when an attempt went on with the state of an earlier one.
        tokens_seen: tokens read, repetitions included.
    """

    curve: list[tuple[int, float]]
    seconds: float
    resumed_at: list[int]
    tokens_seen: int

    def details(self, kind: str, engine: str, schedule: Schedule, seq_len: int) -> dict[str, Any]:
        """Return `details["training"]` of a report, its `equality` still unknown (None)."""
        return {
            "kind": kind,
            "engine": engine,
            **{name: getattr(schedule, name) for name in ("steps", "batch", "learning_rate")},
            "seq_len": seq_len,
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
            "resumed_at": self.resumed_at,
            "curve": [list(point) for point in self.curve],
            "equality": None,
        }


@dataclass
class _Progress:
    """What changes from step to step beside the tensors."""

    step: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)


def fit(
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    crops: Tensor,
    schedule: Schedule,
    state: Path,
    say: Callable[[str], None],
    owner: str,
) -> Fit:
    """Train `parameters` in place to lower `loss`, or go on with what is kept in folder `state`.

    `loss` takes int64 [batch, T], some rows of `crops` int64 [samples, T], and returns a scalar in
    nats that depends on them and on the parameters alone. `owner` names the method in errors.

    Raises:
        ConfigError: there are fewer crops than a batch takes, or they are too short to predict
            anything; or the loss or its gradient is NaN or infinite.
    """
    _check_crops(crops, schedule)
    optimizer = _optimizer(parameters, schedule)
    run = _digest(schedule, crops, parameters)
    progress = _resume(state / STATE, run, parameters, optimizer, say)
    every = -(-schedule.steps // CURVE_POINTS)
    kept = said = mark = time.monotonic()
    while progress.step < schedule.steps:
        batch = batch_at(progress.step, crops, schedule.batch)
        value = _step(parameters, optimizer, loss(batch), schedule, progress.step, owner)
        progress.recent.append(value)
        progress.step += 1
        ended = progress.step == schedule.steps
        if progress.step % every == 0 or ended:
            mean = sum(progress.recent) / len(progress.recent)
            progress.curve.append((progress.step, mean))
            progress.recent = []
        now = time.monotonic()
        progress.seconds, mark = progress.seconds + now - mark, now
        if ended or now - kept >= KEEP_SECONDS:
            _keep(state / STATE, run, parameters, optimizer, progress)
            kept = time.monotonic()
        if ended or now - said >= SAY_SECONDS:
            left = progress.seconds / progress.step * (schedule.steps - progress.step)
            done = f"step {progress.step} of {schedule.steps}, loss {value:.3f}"
            say(f"training: {done}, {left:.0f} s left")
            said = now
    tokens = schedule.steps * schedule.batch * crops.shape[1]
    return Fit(progress.curve, progress.seconds, progress.resumed_at, tokens)


def train_at_once(
    method: TrainingMethod,
    owner: str,
    model: nn.Module,
    tokenizer: Any,
    calibration: Tensor | None,
    into: Path,
) -> QuantizeReport:
    """Let `method` train in a folder that is gone afterwards: nothing is kept of an ended attempt.

    `owner` is its name, for the error where there is no `calibration`.
    """
    crops = need_calibration(owner, calibration)
    with tempfile.TemporaryDirectory() as state:
        return method.train(model, tokenizer, crops, into, Path(state), lambda text: None)


def batch_at(step: int, crops: Tensor, batch: int) -> Tensor:
    """Return the rows of `crops` [samples, T] that step `step`, the first being 0, reads.

    Every crop is read once before one is read again, in another order each time; a batch may go
    on into the next round.
    """
    samples = crops.shape[0]
    first, last = step * batch, (step + 1) * batch
    rounds = range(first // samples, (last - 1) // samples + 1)
    orders = [
        torch.randperm(samples, generator=torch.Generator().manual_seed(number))
        for number in rounds
    ]
    start = first - rounds[0] * samples
    return crops[torch.cat(orders)[start : start + batch]]


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross entropy, nats, of logits [B, T, V] as to the next of ids [B, T]."""
    flat = logits[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(flat, ids[:, 1:].flatten())


def divergence_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean KL(teacher || model), nats, of two logits [B, T, V], over all B T tokens."""
    ours = functional.log_softmax(logits.float().flatten(0, 1), -1)
    theirs = functional.log_softmax(teacher.float().flatten(0, 1), -1)
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _check_crops(crops: Tensor, schedule: Schedule) -> None:
    samples, length = crops.shape
    if length < 2:
        raise ConfigError(
            f"method.calibration.seq_len is {length}; training predicts each token from those "
            "before it and needs crops of 2 or more"
        )
    if samples < schedule.batch:
        raise ConfigError(
            f"method.training.batch is {schedule.batch}, but there are only {samples} crops to "
            f"train on; set method.calibration.samples to {schedule.batch} or more"
        )


def _optimizer(parameters: Mapping[str, nn.Parameter], schedule: Schedule) -> torch.optim.AdamW:
    groups = [
        {
            "params": [p for p in parameters.values() if (p.ndim >= 2) == matrices],
            "weight_decay": schedule.weight_decay if matrices else 0.0,
        }
        for matrices in (True, False)
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=BETAS)


def _step(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    loss: Tensor,
    schedule: Schedule,
    step: int,
    owner: str,
) -> float:
    """Take one step and return the loss, nats.

    Raises:
        ConfigError: the loss or its gradient is NaN or infinite.
    """
    value = loss.item()
    optimizer.zero_grad()
    if math.isfinite(value):
        torch.autograd.backward(loss)
        norm = float(nn.utils.clip_grad_norm_(parameters.values(), schedule.clip))
    what, found = ("gradient", norm) if math.isfinite(value) else ("loss", value)
    if not math.isfinite(found):
        raise ConfigError(
            f"training of {owner} diverged: the {what} of step {step + 1} of {schedule.steps} is "
            f"{found}; set method.training.learning_rate below {schedule.learning_rate:g}"
        )
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step)
    optimizer.step()
    return value


def _digest(schedule: Schedule, crops: Tensor, parameters: Mapping[str, nn.Parameter]) -> str:
    """Return the SHA-256 of what a kept state must have been made with."""
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    facts = [FORMAT, asdict(schedule), list(crops.shape), shapes]
    found = hashlib.sha256(json.dumps(facts).encode())
    found.update(crops.contiguous().numpy().data)
    return found.hexdigest()


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().numpy().data)
    return found.hexdigest()


def _keep(
    path: Path,
    run: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    progress: _Progress,
) -> None:
    """Write the state as one whole file: under another name first, so that none is half written."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        own = {"parameter": parameter.detach(), **optimizer.state[parameter]}
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in own.items()}
    header = {
        "run": run,
        "tensors": _tensors_digest(tensors),
        "progress": json.dumps(asdict(progress)),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, header)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _resume(
    path: Path,
    run: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    say: Callable[[str], None],
) -> _Progress:
    """Put the state kept in `path` into parameters and optimizer; return how far it had come."""
    if not path.exists():
        return _Progress()
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        header, tensors = {}, {}
    if header.get("tensors") != _tensors_digest(tensors) or header.get("run") != run:
        say(f"training: the state in {path.name} is damaged or of another run; from the beginning")
        return _Progress()
    progress = _Progress(**json.loads(header["progress"]))
    progress.curve = [(int(step), float(loss)) for step, loss in progress.curve]
    progress.resumed_at.append(progress.step)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors.pop(f"{name}/parameter"))
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition("/")
        optimizer.state[parameters[owner]][key] = tensor
    say(f"training: going on behind step {progress.step}")
    return progress
