"""A transformers encoder (`methods.encoders`) behind the `Engine` protocol, and the choice of one.

It reads whole sequences, padded on the right, with an attention mask; it has no cache and no next
token. Padding changes nothing but the rounding of sums, except where a method takes one scale for
the activations of a whole call (`couples_rows`): there sequences are to be read one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.errors import ConfigError
from methods.base import Cache, KernelUse
from methods.encoders import (
    EMBED,
    FILL,
    MEAN,
    MEMORY,
    POOLING,
    context_length,
    is_encoder,
    kind_of,
    pool,
)
from methods.engine import TorchEngine, kernel_choices


def pooling_of(config: Any) -> str:
    """Return how the model makes one vector of its tokens' ones; the mean where it does not say."""
    return str(getattr(config, POOLING, None) or MEAN)


class NoNextToken:
    """What an encoder's engine answers where it is asked for a next token."""

    def prefill(
        self, input_ids: Tensor, cache: Cache | None = None, last: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Refuse: an encoder predicts no next token."""
        raise ConfigError("an encoder predicts no next token; use suite=encoder")

    def decode(self, token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Refuse: an encoder predicts no next token."""
        raise ConfigError("an encoder predicts no next token; use suite=encoder")


class EncoderEngine(NoNextToken):
    """Runs the encoder `model` (in eval mode, on `device`) over padded batches."""

    def __init__(
        self, model: Any, device: str, uses: list[KernelUse], couples_rows: bool = False
    ) -> None:
        self.couples_rows = couples_rows
        self.model = model
        self.device = torch.device(device)
        self.pooling = pooling_of(model.config)
        self._fills = kind_of(model.config) == "masked"
        self._uses = uses

    @property
    def choices(self) -> list[dict[str, Any]]:
        """What was measured to choose kernels by the number of tokens, once for each shape."""
        return kernel_choices(self.model)

    @property
    def capabilities(self) -> frozenset[str]:
        """Embeddings; masked positions where the model has the head."""
        return frozenset({EMBED, MEMORY, FILL} if self._fills else {EMBED, MEMORY})

    @property
    def runtime(self) -> str:
        """PyTorch."""
        return "pytorch"

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return int(self.model.config.vocab_size)

    @property
    def context_length(self) -> int:
        """Most tokens the model takes at once."""
        return context_length(self.model)

    @torch.no_grad()
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read int64 [B, T] and its mask; return the last hidden states, float32 [B, T, H]."""
        found = self.model.base_model(
            input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device)
        )
        hidden: Tensor = found.last_hidden_state.float()
        return hidden

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read the same; return float32 [B, H], pooled as the model says."""
        return pool(self.encode(input_ids, attention_mask), attention_mask, self.pooling)

    @torch.no_grad()
    def fill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read the same; return float32 logits [B, T, V]."""
        found = self.model(
            input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device)
        )
        logits: Tensor = found.logits.float()
        return logits

    def kernels(self) -> list[KernelUse]:
        """Return what runs each matrix."""
        return list(self._uses)

    def close(self) -> None:
        """Drop the model, so that its memory is free for the next engine."""
        self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def engine_of(
    model: Any, device: str, uses: list[KernelUse], couples_rows: bool = False
) -> TorchEngine | EncoderEngine:
    """Return the engine that fits `model`: one of an encoder, or of a causal language model."""
    kind = EncoderEngine if is_encoder(model) else TorchEngine
    return kind(model, device, uses, couples_rows)
