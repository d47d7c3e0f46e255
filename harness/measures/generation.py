"""Greedy texts of the engine beside those of the unquantized model, from equal prompts.

Prompts are cut from the evaluation text at places drawn with the seed. Every text has the full
number of tokens; the end-of-text token does not stop it, so that all comparisons have equal length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.context import Context
from harness.measures.statistics import stderr_of_mean
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine

KIND = "generation"


@dataclass(frozen=True)
class Generation:
    """Share of tokens equal to the unquantized model's, and where the first differs.

    Attributes:
        prompts: number of prompts.
        prompt_length: tokens of a prompt, BOS included where the tokenizer adds one.
        new_tokens: tokens generated after each.
    """

    prompts: int = 8
    prompt_length: int = 64
    new_tokens: int = 64

    quality: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "cache"})

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_length", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"generation's {name} is {getattr(self, name)}; it must be >= 1")

    def prepare(self, reference: Engine, context: Context) -> None:
        """Keep the prompts and what the unquantized model writes after them."""

        def build() -> dict[str, Tensor]:
            prompts = self._prompts(context)
            return {"prompts": prompts, "tokens": greedy(reference, prompts, self.new_tokens)}

        self._check(reference)
        context.keep_reference(KIND, self._key(context), build)

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return the two comparisons; the texts go to `context.details["generation"]`."""
        self._check(engine)
        kept = context.reference(KIND, self._key(context))
        tokens = greedy(engine, kept["prompts"], self.new_tokens)
        equal = tokens == kept["tokens"]
        # Tokens before the first difference: ones of the running product of equality.
        before = equal.long().cumprod(1).sum(1).double()
        decode = context.tokenizer.decode
        context.details["generation"] = [
            {"prompt": decode(prompt), "reference": decode(reference), "text": decode(text)}
            for prompt, reference, text in zip(kept["prompts"], kept["tokens"], tokens, strict=True)
        ]
        protocol = f"greedy_{self.prompts}x{self.new_tokens}"
        return [
            _value("equal_tokens", protocol, equal.double().mean(1), "share"),
            _value("first_difference", protocol, before, "tokens"),
        ]

    def _key(self, context: Context) -> list[Any]:
        digest = context.texts.tokens("gptq").digest
        return [digest, self.prompts, self.prompt_length, self.new_tokens, context.seed]

    def _check(self, engine: Engine) -> None:
        wanted = self.prompt_length + self.new_tokens
        if wanted > engine.context_length:
            raise ConfigError(
                f"generation's prompt_length + new_tokens is {wanted}, but the model reads at most "
                f"{engine.context_length} tokens"
            )

    def _prompts(self, context: Context) -> Tensor:
        """Return int64 [prompts, prompt_length] cut from the evaluation text."""
        tokens = context.texts.tokens("gptq")
        last_start = len(tokens.ids) - self.prompt_length
        if last_start < 0:
            raise ConfigError(
                f"the text {tokens.text!r} has {len(tokens.ids)} tokens, fewer than generation's "
                f"prompt_length of {self.prompt_length}"
            )
        generator = torch.Generator().manual_seed(context.seed)
        starts = torch.randint(last_start + 1, (self.prompts, 1), generator=generator)
        prompts = tokens.ids[starts + torch.arange(self.prompt_length)]
        if tokens.bos is not None:
            prompts[:, 0] = tokens.bos
        return prompts


def _value(metric: str, protocol: str, per_prompt: Tensor, unit: str) -> Value:
    samples = per_prompt.tolist()
    mean, stderr = float(per_prompt.mean()), stderr_of_mean(samples)
    return Value("generation", metric, protocol, mean, unit, True, stderr, tuple(samples))


def greedy(engine: Engine, prompts: Tensor, count: int) -> Tensor:
    """Return the `count` most likely tokens after int64 `prompts` [B, T]: int64 [B, count]."""
    logits, cache = engine.prefill(prompts, last=1)
    token = logits[:, -1:].argmax(-1)
    tokens = [token]
    for _ in range(count - 1):
        logits, cache = engine.decode(token, cache)
        token = logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, dim=1).cpu()
