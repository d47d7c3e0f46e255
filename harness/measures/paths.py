"""Whether the packed kernels compute what the stored weights say.

The artefact is loaded a second time with every matrix dequantized at each call, and the logits of
both are compared, prefill and decode apart. Perplexity alone would not do: no decode kernel runs
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from harness.context import Context
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine
from methods.packed import DECODED_TOKENS, compare_paths


@dataclass(frozen=True)
class Paths:
    """Compares packed and dequantized logits; a disagreement fails the cell.

    Attributes:
        tokens: length of the sequence that is read, the last few of it one by one.
    """

    tokens: int = 64

    quality: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "cache"})
    decisive: ClassVar[bool] = True
    """No other figure of the cell counts where this one fails."""

    def __post_init__(self) -> None:
        if self.tokens <= DECODED_TOKENS:
            raise ConfigError(f"paths' tokens is {self.tokens}; it must be above {DECODED_TOKENS}")

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return the relative differences; nothing for a method with one path only.

        Raises:
            PathDisagreementError: they are above the method's named tolerance.
        """
        if context.dequantized is None:
            return []
        other, tolerance = context.dequantized()
        ids = self._ids(engine, context)
        try:
            found = compare_paths(engine, other, ids, tolerance)
        finally:
            other.close()
        context.details["paths"] = {"tolerance": tolerance, "tokens": ids.shape[1]}
        return [
            Value("paths", metric, f"tokens{ids.shape[1]}", value, "ratio", False)
            for metric, value in (
                ("path_difference_prefill", found.prefill),
                ("path_difference_decode", found.decode),
            )
        ]

    def _ids(self, engine: Engine, context: Context) -> torch.Tensor:
        """Return int64 [1, tokens]: the start of the evaluation text, or drawn without one."""
        length = min(self.tokens, engine.context_length)
        if context.tokenizer is None:
            generator = torch.Generator().manual_seed(context.seed)
            return torch.randint(engine.vocab_size, (1, length), generator=generator)
        return context.texts.tokens("gptq").ids[None, :length]
