"""What a measure needs around it, made by hand: context, tokens, engines of known logits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from harness.artefacts import Manifest, file_facts, publish
from harness.cache import Cache
from harness.context import Context
from harness.data import Texts, Tokens
from harness.hardware import Hardware
from harness.load import model_facts
from harness.record import Value
from methods.base import KernelUse
from methods.engine import TorchEngine
from methods.unquantized import Unquantized
from tests.architectures import tiny

CPU = Hardware("cpu", "cpu", threads=1)


class FixedTexts:
    """Tokens given by hand, the same for both protocols."""

    def __init__(self, ids: Tensor, bos: int | None) -> None:
        self.ids, self.bos = ids, bos

    def tokens(self, protocol: str) -> Tokens:
        return Tokens("text", self.ids, self.bos, f"digest of {len(self.ids)} {protocol}")


def make_context(
    folder: Path,
    ids: Tensor,
    bos: int | None = None,
    tokenizer: Any = None,
    hardware: Hardware = CPU,
) -> Context:
    return Context(
        tokenizer=tokenizer,
        texts=cast(Texts, FixedTexts(ids, bos)),
        hardware=hardware,
        artefact=folder / "artefact",
        cache=Cache(folder / "cache"),
        model_key="a model",
        random_weights=False,
        seed=7,
    )


def drawn_ids(count: int, vocabulary: int, seed: int = 11) -> Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def engine_of(model: Any) -> TorchEngine:
    return TorchEngine(model, "cpu", [])


def by_metric(values: list[Value]) -> dict[str, Value]:
    return {value.metric: value for value in values}


class BigramEngine:
    """Logits that depend on the last token alone: row `token` of a table [V, V]."""

    capabilities = frozenset({"logits", "cache", "generate", "logprobs", "memory"})
    runtime = "table"

    def __init__(self, table: Tensor, context_length: int = 1024, execution: str = "") -> None:
        self.table = table
        self.vocab_size = table.shape[1]
        self.context_length = context_length
        self.execution = execution
        self.read: list[Tensor] = []
        self.closed = False

    def prefill(
        self, input_ids: Tensor, cache: Any = None, last: int | None = None
    ) -> tuple[Tensor, Any]:
        self.read.append(input_ids)
        logits = self.table[input_ids]
        return (logits if last is None else logits[:, -last:]), (cache or 0) + input_ids.shape[1]

    def decode(self, token: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return self.prefill(token, cache)

    def kernels(self) -> list[KernelUse]:
        if not self.execution:
            return []
        return [KernelUse("a", "Linear", "none", cast(Any, self.execution), 1)]

    def close(self) -> None:
        self.closed = True


def drawn_table(vocabulary: int, seed: int = 2) -> Tensor:
    return torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))


def publish_unquantized(
    folder: Path, kind: str = "llama", dtype: str = "float32", stored_bits: int | None = None
) -> Manifest:
    """Make the artefact `folder` of an unquantized tiny model, manifest included."""
    method = Unquantized("plain", dtype)
    temporary = folder.with_name("temporary")
    model = tiny(kind)
    report = method.quantize(model, None, None, temporary)
    manifest = Manifest(
        files=file_facts(temporary),
        method="plain",
        bits=method.bits,
        group_size=None,
        matrices=[asdict(matrix) for matrix in report.quantized],
        stored_bits=report.stored_bits if stored_bits is None else stored_bits,
        left_out=[list(entry) for entry in report.left_out],
        notes=[],
        quantize_seconds=0.0,
        quantize_peak_bytes=0,
        model=model_facts(model),
        calibration=None,
        unquantized=report.unquantized,
        details={},
    )
    publish(temporary, folder, manifest)
    return manifest
