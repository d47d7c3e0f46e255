"""A transformers causal language model behind the `Engine` protocol."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from methods.base import Cache, KernelUse

CAPABILITIES = frozenset({"logits", "cache", "fork", "generate", "logprobs", "memory"})

FORKED_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache whose state is keys and values, and which never change those in place."""


def cap_attention(model: Any) -> None:
    """Make `model` cap its attention scores where its configuration says so (Gemma 2).

    PyTorch's fused attention, which transformers takes by itself, knows no cap and would leave it
    out without a word.
    """
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")


class TorchEngine:
    """Runs `model` (in eval mode, on `device`) token by token, with its keys and values kept.

    The cache handed in is advanced in place and handed back. Sequences of a batch have equal
    length; a causal model may be right-padded, since no token sees what follows it.
    """

    most_forked: ClassVar[None] = None

    def __init__(
        self, model: Any, device: str, uses: list[KernelUse], couples_rows: bool = False
    ) -> None:
        cap_attention(model)
        self.couples_rows = couples_rows
        self.model = model
        self.device = torch.device(device)
        self._uses = uses
        layers = DynamicCache(config=model.config).layers
        self._forks = all(type(layer) in FORKED_LAYERS for layer in layers)

    @property
    def capabilities(self) -> frozenset[str]:
        """Everything but serving; no fork where a layer keeps more than keys and values."""
        return CAPABILITIES if self._forks else CAPABILITIES - {"fork"}

    @property
    def runtime(self) -> str:
        """PyTorch."""
        return "pytorch"

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.model.config.vocab_size)

    @property
    def context_length(self) -> int:
        """Most tokens the model takes at once."""
        return int(self.model.config.max_position_embeddings)

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, cache: Cache | None = None, last: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Read int64 [B, T]; return float32 logits [B, last or T, V] on the CPU or the device."""
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        output = self.model(
            input_ids=input_ids.to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last or 0,
        )
        return output.logits.float(), output.past_key_values

    @torch.no_grad()
    def decode(self, token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Read int64 [B, 1]; return float32 logits [B, 1, V] and the advanced cache."""
        return self.prefill(token, cache)

    def fork(self, cache: Cache, rows: Sequence[int]) -> Cache:
        """Return a cache with the sequences `rows` of `cache`, which is left as it was."""
        forked = copy.copy(cache)
        forked.layers = [copy.copy(layer) for layer in cache.layers]
        same = len(set(rows)) == 1
        for layer in forked.layers:
            if same:
                # A view: the next tokens make new tensors anyway.
                part = slice(rows[0], rows[0] + 1)
                layer.keys = layer.keys[part].expand(len(rows), -1, -1, -1)
                layer.values = layer.values[part].expand(len(rows), -1, -1, -1)
            else:
                index = torch.tensor(rows, device=layer.keys.device)
                layer.keys = layer.keys.index_select(0, index)
                layer.values = layer.values.index_select(0, index)
        return forked

    def kernels(self) -> list[KernelUse]:
        """Return what runs each matrix."""
        return list(self._uses)

    def close(self) -> None:
        """Drop the model, so that its memory is free for the next engine."""
        self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
