"""What a measure is given beside the engine, and what a measure is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from harness.cache import Cache
from harness.data import Texts
from harness.hardware import Hardware
from harness.models import ModelSource
from harness.record import Value
from harness.samples import Answers
from methods.base import Engine


class ReferenceMissingError(Exception):
    """An output of the unquantized model is not in the cache: it has to be computed first."""


@dataclass
class Context:
    """The surroundings of one measurement.

    Attributes:
        tokenizer: the model's Hugging Face tokenizer; None for random weights without one.
        texts: the evaluation text as tokens, per protocol.
        hardware: the hardware of the cell.
        artefact: folder of the artefact behind the engine.
        cache: entries shared by the cells of a sweep.
        model_key: identity of the unquantized model and its floating type, part of every key of a
            reference's output.
        random_weights: quality means nothing; measures of quality are not run.
        seed: seed of anything drawn.
        has_reference: whether there is an unquantized model to compare with.
        baseline: loads the baseline's engine for interleaved timing; None in the baseline's cell.
        dequantized: loads the artefact with every matrix dequantized at each call, and the
            tolerance its logits must keep to; None for a method with one path only.
        resident_at_start: bytes that the process held before the artefact was loaded.
        loaders: way -> what loads the artefact once more in that way; the only one is named "".
        task_folder: holds the data of lm-eval's tasks as the hub names them; None: the hub does.
        details: what is not a number goes here, under the measure's name, and into the record.
        answers: (metric, protocol) of a task's value -> questions and answers behind its samples.
        lm_eval: what lm-eval itself would have left of the tasks; empty where none were evaluated.
        problems: part of the running measure -> what kept it from being measured; the rest counts.
        losses: windows read together (`Windows.batch_key`) -> the engine that read them, and the
            mean loss of each in nats: a measure that had their logits spares another the forward.
    """

    tokenizer: Any
    texts: Texts
    hardware: Hardware
    artefact: Path
    cache: Cache
    model_key: str
    random_weights: bool
    seed: int
    has_reference: bool = True
    baseline: Callable[[], Engine] | None = None
    dequantized: Callable[[], tuple[Engine, float]] | None = None
    resident_at_start: int = 0
    loaders: Mapping[str, Callable[[], Engine]] = field(default_factory=dict)
    task_folder: Path | None = None
    details: dict[str, Any] = field(default_factory=lambda: {"notes": []})
    answers: dict[tuple[str, str], Answers] = field(default_factory=dict)
    lm_eval: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, Exception] = field(default_factory=dict)
    losses: dict[tuple[Any, ...], tuple[Engine, list[float]]] = field(default_factory=dict)

    def reference(self, kind: str, key: Any) -> dict[str, Any]:
        """Return a reference output that `Comparing.prepare` wrote.

        Raises:
            ReferenceMissingError: it is absent or damaged; the parent runs the reference again.
        """
        tensors = self.cache.read(f"reference/{kind}", [self.model_key, key])
        if tensors is None:
            raise ReferenceMissingError(f"{kind} of the unquantized model is not in the cache")
        return tensors

    def keep_reference(
        self, kind: str, key: Any, build: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return a reference output, computed by `build` where it is absent or damaged."""
        return self.cache.get(f"reference/{kind}", [self.model_key, key], build)


def reference_model_key(job: dict[str, Any]) -> str:
    """Return `Context.model_key` of a child's job."""
    return f"{job['model_key']} {job['config']['reference_dtype']}"


class Measure(Protocol):
    """One question asked of an engine; a frozen dataclass whose fields are its YAML's schema.

    Attributes:
        quality: its values say something of the weights, so nothing for random ones.
        needs: capabilities the engine must have.

    One that must see the process before others have worked in it has
    `goes_first: ClassVar[bool] = True`. One without which no other figure counts has
    `decisive: ClassVar[bool] = True`: its failure is the cell's.
    """

    quality: ClassVar[bool]
    needs: ClassVar[frozenset[str]]

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Measure `engine`."""
        ...


@runtime_checkable
class Comparing(Protocol):
    """A measure that compares with the unquantized model; not run where there is none."""

    needs: ClassVar[frozenset[str]]

    def prepare(self, reference: Engine, context: Context) -> None:
        """Put what the measure compares with into the cache; `reference` is the FP32 model."""
        ...


@runtime_checkable
class Checking(Protocol):
    """A measure of which some mistakes show before any weight is loaded."""

    def check(self, source: ModelSource, cache: Path) -> None:
        """Raise ConfigError for what cannot work; `cache` is the folder that cells share."""
        ...
