"""Whether a deployed model works at all: finite logits, the same text from the same prompt twice.

The prompt is the start of the evaluation text; the text behind it is greedy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.context import Context
from harness.measures.generation import greedy
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine


@dataclass(frozen=True)
class Functional:
    """Reads a prompt and writes after it, twice.

    Attributes:
        prompt_length: tokens of the prompt, BOS included where the tokenizer adds one.
        new_tokens: tokens written after it.
    """

    prompt_length: int = 32
    new_tokens: int = 32

    quality: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "cache"})

    def __post_init__(self) -> None:
        for name in ("prompt_length", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"functional's {name} is {getattr(self, name)}; it must be >= 1")

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return the number of logits that are not finite and the share of tokens that repeat.

        Raises:
            ConfigError: the model reads fewer tokens, or has no tokenizer to read text with.
        """
        wanted = self.prompt_length + self.new_tokens
        if wanted > engine.context_length:
            raise ConfigError(
                f"functional's prompt_length + new_tokens is {wanted}, but the model reads at most "
                f"{engine.context_length} tokens"
            )
        if context.tokenizer is None:
            raise ConfigError("functional reads text, but the model has no tokenizer")
        prompt = context.texts.tokens("gptq").ids[None, : self.prompt_length]
        logits, _ = engine.prefill(prompt)
        first = greedy(engine, prompt, self.new_tokens)
        second = greedy(engine, prompt, self.new_tokens)
        context.details["functional"] = {"text": context.tokenizer.decode(first[0])}
        protocol = f"greedy_{self.prompt_length}+{self.new_tokens}"
        broken = float((~logits.isfinite()).sum())
        equal = float((first == second).double().mean())
        return [
            Value("functional", "non_finite_logits", protocol, broken, "logits", False),
            Value("functional", "repeated_tokens_equal", protocol, equal, "share", True),
        ]
