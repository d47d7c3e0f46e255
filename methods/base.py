"""The two protocols the project turns on: a method makes artefacts, an engine answers tokens.

A method is a frozen dataclass whose fields are the schema of its YAML file. It writes an artefact
in its own deployable format, and loads that artefact again as an engine; what is measured is
always the loaded engine, never the object left behind by quantizing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError

Execution = Literal["packed", "dequantized", "simulated"]
"""How a matrix is run: a kernel reads the packed weights; they are converted at each call; or
rounded values are stored as floats (no speed, memory or size figure)."""

Role = Literal["block", "head", "embedding"]

Cache = Any
"""State behind the tokens already read; only the engine that made it can look inside."""


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of the model: `count` copies of [out_features, in_features]."""

    name: str
    role: Role
    out_features: int
    in_features: int
    count: int = 1

    @property
    def weights(self) -> int:
        """Number of weights, all copies together."""
        return self.count * self.out_features * self.in_features


@dataclass(frozen=True)
class KernelUse:
    """Which kernel runs one matrix: the provenance that a record states."""

    name: str
    layer: str
    kernel: str
    execution: Execution
    weights: int


@dataclass(frozen=True)
class QuantizeReport:
    """What a method says of the artefact it wrote, beside the files.

    Attributes:
        quantized: the matrices stored in the method's own format.
        stored_bits: all bits stored for them, scales, zero points and indices included.
        left_out: (name, number of weights, why) of every other parameter.
        notes: sentences a reader of the row must know.
        bits, group_size: as the artefact has them, where only it can tell; else the method's.
        unquantized: the floating type that all weights are stored in as they were (`float16`);
            None where anything was quantized. Rows of one type on several engines are compared.
        details: JSON that the record shows beside the row, by what made it (`training`,
            `allocation`, `pruning`).
    """

    quantized: Sequence[Matrix]
    stored_bits: int
    left_out: Sequence[tuple[str, int, str]]
    notes: Sequence[str] = ()
    bits: float | None = None
    group_size: int | None = None
    unquantized: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """How much of the calibration text a method is shown: crops drawn with `seed`."""

    samples: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("samples", "seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"calibration.{name} is {getattr(self, name)}; it must be 1 or more"
                )


class Hardware(Protocol):
    """The part of `harness.hardware.Hardware` that a method may ask."""

    @property
    def device(self) -> str:
        """Device as torch names it: `cpu`, `cuda`."""
        ...

    @property
    def compute_dtype(self) -> str:
        """Floating type of activations: `float32`, `bfloat16`, `float16`."""
        ...

    @property
    def usable_threads(self) -> int:
        """CPU threads that an engine with threads of its own may use."""
        ...

    @property
    def gpu_layers(self) -> int | None:
        """Decoder blocks that an engine which can split a model puts on the card; None: all."""
        ...

    @property
    def allow_fallback(self) -> bool:
        """Whether a matrix without a kernel of its own may be dequantized at each call."""
        ...

    @property
    def offload(self) -> str | None:
        """Where decoder blocks that do not stay on the device are kept: `cpu`, `disk`, or None."""
        ...

    @property
    def resident_bytes(self) -> int:
        """Most bytes of decoder blocks that stay on the device where there is offloading."""
        ...

    @property
    def decode(self) -> str:
        """`auto`: the fastest code that knows the model decodes; `model`: transformers does."""
        ...


class Engine(Protocol):
    """The deployed model, as every measure sees it.

    One whose logits of a sequence depend on what is read beside it (one scale for the activations
    of a whole call) has `couples_rows = True`: where answers are scored it reads them one by one.
    """

    @property
    def capabilities(self) -> frozenset[str]:
        """What the engine can give; a measure asks before it runs.

        `logits`: prefill and decode; `cache`: prefill continues a cache; `fork`: a cache goes on in
        several ways (`Forking`); `generate`, `logprobs`: texts (`Writing`, where there are no
        logits) and log-probabilities of given tokens (`Scoring`); `memory`: the model is in this
        process, so that the process's memory and loading time are the model's; `serve`: requests
        from several clients at once (`Serving`); `embed`, `fill`: an encoder's vectors, and what it
        puts at masked positions (`methods.encoders.Encoding`, `Filling`).
        """
        ...

    @property
    def runtime(self) -> str:
        """What executes the model: `pytorch`, `llama.cpp`, `onnxruntime`, `server`."""
        ...

    @property
    def vocab_size(self) -> int:
        """Width V of the logits."""
        ...

    @property
    def context_length(self) -> int:
        """Most tokens the model takes at once."""
        ...

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, cache: Cache | None = None, last: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Read int64 [B, T]; return float32 logits [B, last or T, V] and the state behind them."""
        ...

    @torch.no_grad()
    def decode(self, token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Read one int64 token a sequence [B, 1]; return float32 logits [B, 1, V] and the state."""
        ...

    def kernels(self) -> list[KernelUse]:
        """Return layer class, kernel and execution state of each matrix."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


@runtime_checkable
class Forking(Protocol):
    """An engine whose cache can be copied, so that what several texts begin with is read once.

    Attributes:
        most_forked: most sequences of a cache that is forked, and of its forks; None: any number.
    """

    most_forked: ClassVar[int | None]

    def fork(self, cache: Cache, rows: Sequence[int]) -> Cache:
        """Return a cache of its own with the sequences `rows` of `cache`, which may repeat.

        `cache` is left as it was.
        """
        ...


@runtime_checkable
class Scoring(Protocol):
    """An engine that scores given tokens without showing its logits (a server)."""

    def token_log_likelihoods(self, input_ids: Tensor) -> Tensor:
        """Return log p(token | those before it), nats, float32 [B, T - 1], of int64 [B, T]."""
        ...

    def token_scores(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same, and whether each token is the likeliest there, bool [B, T - 1].

        Raises:
            ConfigError: the engine does not tell which is the likeliest.
        """
        ...


@runtime_checkable
class Writing(Protocol):
    """An engine that writes texts without showing its logits (a server)."""

    def write(self, prompts: Sequence[Sequence[int]], most: int, stops: Sequence[str]) -> list[str]:
        """Return the text behind the tokens of each prompt, greedily, at most `most` tokens.

        It may end at the first of `stops`, or go on behind it.
        """
        ...


@runtime_checkable
class Storing(Protocol):
    """An engine whose artefact is no safetensors file and that says what it stores."""

    def stored_bytes(self) -> dict[str, int]:
        """Return bytes of each stored tensor, from the file's header, no weight read.

        Named like the parameters of the Hugging Face model, so that what is stored for a matrix
        are all tensors whose names begin with the matrix's.
        """
        ...


@runtime_checkable
class SizedCache(Protocol):
    """A cache of an engine that is no PyTorch module and still says what it holds."""

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the tokens read so far."""
        ...


class Method(Protocol):
    """A quantization scheme with all its options.

    One that can keep decoder blocks away from the device (`hardware.offload`) has
    `offloads: ClassVar[bool] = True`; others are refused there. One that stores a tied pair of
    head and embedding once, when it covers them, has `keeps_ties: ClassVar[bool] = True`; one that
    stores what it does not cover in a type of its own names that in `rest_dtype: str`. One that
    takes encoders beside causal models has `encoders: ClassVar[bool] = True`.

    A method that is shown text has a field `calibration: Calibration`, so that the text is part
    of its artefact's identity; `needs_calibration` says so.
    """

    needs_calibration: ClassVar[bool]

    @property
    def name(self) -> str:
        """Name of the method as tables show it."""
        ...

    @property
    def bits(self) -> float | None:
        """Bits of a stored weight without scales; None where the method has no single one."""
        ...

    @property
    def group_size(self) -> int | None:
        """Consecutive inputs that share a scale; -1 is per channel, None: no such notion."""
        ...

    def check(self, hardware: Hardware) -> None:
        """Raise ConfigError where the options, or they on this hardware, cannot run."""
        ...

    def stored_bits(self, matrix: Matrix) -> int:
        """Return the bits this method stores for `matrix`, by arithmetic alone."""
        ...

    def select(self, model: nn.Module) -> tuple[list[Matrix], list[tuple[str, int, str]]]:
        """Return the matrices the method covers in `model` (may be on meta), and what it leaves."""
        ...

    def quantize(
        self, model: nn.Module, tokenizer: Any, calibration: Tensor | None, into: Path
    ) -> QuantizeReport:
        """Write the artefact of `model` (float32 on the CPU, changed in place) into folder `into`.

        `calibration` is int64 [samples, seq_len] where `needs_calibration`, else None.
        """
        ...

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the artefact in folder `artefact` for `hardware`."""
        ...


@runtime_checkable
class TrainingMethod(Protocol):
    """A method that trains the model, and goes on where an attempt that was ended had come to.

    Its `calibration` is the text that it trains on, as crops.
    """

    def train(
        self,
        model: nn.Module,
        tokenizer: Any,
        calibration: Tensor,
        into: Path,
        state: Path,
        say: Callable[[str], None],
    ) -> QuantizeReport:
        """Do what `Method.quantize` does, with a folder and a voice for the hours it may take.

        `state` is a folder of this very artefact: what is put there (whole files only) is found
        again after a crash, and gone once the artefact is written. `say` shows how far it is.
        """
        ...


@runtime_checkable
class LayerwiseMethod(Protocol):
    """A method that makes packed modules of single matrices, so that others may do the rest."""

    def modules(
        self, model: nn.Module, matrices: Sequence[Matrix], calibration: Tensor | None
    ) -> Mapping[str, nn.Module]:
        """Return name -> what replaces the matrix (`methods.linear.QuantizedModule`).

        `model` is left as it was; `calibration` as for `Method.quantize`.
        """
        ...


@runtime_checkable
class AdoptingMethod(Protocol):
    """A method that measures what somebody else has quantized: a checkpoint, or a server.

    `takes_weights` says whether it needs the model's weights, or its tokenizer alone.
    """

    takes_weights: ClassVar[bool]

    def adopt(self, checkpoint: Path, model: nn.Module, into: Path) -> QuantizeReport:
        """Make an artefact in `into` of the folder `checkpoint`; `model` is its shape, on meta."""
        ...


@runtime_checkable
class ForeseeingMethod(Protocol):
    """A method whose library changes what it is asked for, in ways that shapes alone tell."""

    def foresee(self, model: nn.Module) -> list[str]:
        """Return what will be done otherwise with `model` (may be on meta), one sentence each."""
        ...


@runtime_checkable
class LoadingMethod(Protocol):
    """A method whose artefact can be loaded in several ways (mapped into memory, read)."""

    loadings: ClassVar[tuple[str, ...]]

    def load_as(self, way: str, artefact: Path, hardware: Hardware) -> Engine:
        """Load the artefact in the way `way`, one of `loadings`."""
        ...


@runtime_checkable
class TwoPathMethod(Protocol):
    """A method whose packed kernels can be held against plain dequantized weights."""

    path_tolerance: ClassVar[float]

    def load_dequantized(self, artefact: Path, hardware: Hardware) -> Engine:
        """Load the artefact with every matrix dequantized at each call."""
        ...
