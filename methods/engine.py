"""A transformers causal language model behind the `Engine` protocol."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from methods.base import Cache, KernelUse
from methods.kv_cache import BufferedCache, BufferedLayer, rows_of

CAPABILITIES = frozenset({"logits", "cache", "fork", "generate", "logprobs", "memory"})

FORKED_LAYERS = (BufferedLayer, DynamicSlidingWindowLayer)
"""Layers of a cache whose state is keys and values, and which never change what a fork sees."""

BY_MODEL = "transformers eager"


def relative_difference(logits: Tensor, expected: Tensor) -> float:
    """Return the root mean square difference over that of `expected` about its mean per token."""
    spread = expected - expected.mean(-1, keepdim=True)
    return float((logits - expected).square().mean().sqrt() / spread.square().mean().sqrt())


class FastDecode(Protocol):
    """Decodes in place of the model where it can.

    Attributes:
        name: for the provenance.
    """

    name: str

    def decode(self, token: Tensor, cache: Cache) -> Tensor | None:
        """Read int64 [B, 1]; return float32 logits [B, 1, V] and advance `cache` in place.

        None, and nothing done, for a batch or a cache that the model itself has to read.
        """
        ...


def cap_attention(model: Any) -> None:
    """Make `model` cap its attention scores where its configuration says so (Gemma 2).

    PyTorch's fused attention, which transformers takes by itself, knows no cap and would leave it
    out without a word.
    """
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")


def kernel_choices(model: Any) -> list[dict[str, Any]]:
    """Return what the modules of `model` say of kernels chosen by measuring, each thing once."""
    found: list[dict[str, Any]] = []
    for module in model.modules():
        choice = getattr(module, "choice", None)
        if choice and choice not in found:
            found.append(choice)
    return found


class TorchEngine:
    """Runs `model` (in eval mode, on `device`) token by token, with its keys and values kept.

    The cache handed in is advanced in place and handed back. Sequences of a batch have equal
    length; a causal model may be right-padded, since no token sees what follows it. `fast` decodes
    where there is one; `remark` says why there is none.
    """

    most_forked: ClassVar[None] = None

    def __init__(
        self,
        model: Any,
        device: str,
        uses: list[KernelUse],
        couples_rows: bool = False,
        fast: FastDecode | None = None,
        remark: str = "",
    ) -> None:
        cap_attention(model)
        self.couples_rows = couples_rows
        self.model = model
        self.device = torch.device(device)
        self._uses = uses
        self._fast = fast
        self._remark = remark
        layers = BufferedCache(model.config).layers
        self._forks = all(type(layer) in FORKED_LAYERS for layer in layers)

    @property
    def decoding(self) -> str:
        """What decodes a token, and why nothing faster does."""
        if self._fast is not None:
            return self._fast.name
        return f"{BY_MODEL}: {self._remark}" if self._remark else BY_MODEL

    @property
    def choices(self) -> list[dict[str, Any]]:
        """What was measured to choose kernels by the number of tokens, once for each shape."""
        return kernel_choices(self.model)

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
        cache = BufferedCache(self.model.config) if cache is None else cache
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
        logits = self._fast.decode(token, cache) if self._fast is not None else None
        return self.prefill(token, cache) if logits is None else (logits, cache)

    def fork(self, cache: Cache, rows: Sequence[int]) -> Cache:
        """Return a cache with the sequences `rows` of `cache`, which is left as it was."""
        forked = copy.copy(cache)
        forked.layers = []
        for layer in cache.layers:
            if isinstance(layer, BufferedLayer):
                forked.layers.append(layer.forked(rows))
                continue
            fork = copy.copy(layer)
            fork.keys, fork.values = rows_of(layer.keys, rows), rows_of(layer.values, rows)
            forked.layers.append(fork)
        return forked

    def kernels(self) -> list[KernelUse]:
        """Return what runs each matrix."""
        return list(self._uses)

    def close(self) -> None:
        """Drop the model, so that its memory is free for the next engine."""
        self.model = self._fast = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
