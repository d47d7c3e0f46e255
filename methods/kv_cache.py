"""Keys and values in buffers with room to grow, so that a token is appended and nothing copied.

transformers' own `DynamicLayer` (cache_utils of transformers 5) joins old and new keys into a new
tensor at every token. Here a layer of full attention is a buffer [batch, heads, capacity, size] of
which the first `length` tokens are there; `keys` and `values` are views of those. Layers of any
other kind (sliding windows, linear attention) stay transformers' own.

A fork shares the buffers of the cache it comes from. Whoever appends to shared buffers copies them
first, except the one that was there before: what it appends lies behind what its forks see.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens for which a new buffer has room beyond those it is made for."""


class BufferedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer of full attention.

    Attributes:
        key_buffer, value_buffer: [batch, heads, capacity, size]; None before the first token.
        length: tokens in them.
    """

    def __init__(self) -> None:
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None
        self.length = 0
        self._foreign = False
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """Keys of the tokens read: a view [batch, heads, length, size]."""
        return None if self.key_buffer is None else self.key_buffer[:, :, : self.length]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        # transformers' own code (reorder_cache) sets keys, then values, of one length.
        self.key_buffer = keys
        self.length = 0 if keys is None else keys.shape[2]
        self._foreign = True

    @property
    def values(self) -> Tensor | None:
        """Values of the tokens read: a view [batch, heads, length, size]."""
        return None if self.value_buffer is None else self.value_buffer[:, :, : self.length]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self.value_buffer = values

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the tokens read, without the room behind them."""
        views = (view for view in (self.keys, self.values) if view is not None)
        return sum(view.numel() * view.element_size() for view in views)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type and device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more, in buffers of its own."""
        if self.key_buffer is None or self.value_buffer is None:
            raise ValueError("a layer without a token does not know the shape of its keys")
        capacity = self.key_buffer.shape[2]
        needed = self.length + tokens
        if not self._foreign and needed <= capacity:
            return
        if self._foreign or needed > 2 * capacity:
            capacity = needed + ROOM
        else:
            capacity *= 2
        self.key_buffer = _grown(self.key_buffer, self.length, capacity)
        self.value_buffer = _grown(self.value_buffer, self.length, capacity)
        self._foreign = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, heads, tokens, size]; return views of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        if self.key_buffer is None or self.value_buffer is None:
            capacity = tokens + ROOM
            self.key_buffer = _grown(key_states, tokens, capacity)
            self.value_buffer = _grown(value_states, tokens, capacity)
            self._foreign = False
            self.length = tokens
        else:
            self.reserve(tokens)
            self.key_buffer[:, :, self.length : self.length + tokens] = key_states
            self.value_buffer[:, :, self.length : self.length + tokens] = value_states
            self.length += tokens
        keys, values = self.keys, self.values
        if keys is None or values is None:
            raise RuntimeError("a layer has tokens and no keys")
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens read."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens, or (above 0) keep that many at most."""
        if tokens_to_remove < 0:
            self.length = max(0, self.length + tokens_to_remove)
        elif tokens_to_remove > 0:
            self.length = min(self.length, tokens_to_remove)
        # A fork may see the places that are free now.
        self._foreign = True

    def reset(self) -> None:
        """Forget every token; what forks see stays."""
        self.key_buffer = self.value_buffer = None
        self.length = 0
        self.is_initialized = False

    def forked(self, rows: Sequence[int]) -> BufferedLayer:
        """Return a layer with the sequences `rows`, which shares the memory where it can."""
        fork = copy.copy(self)
        if self.key_buffer is None or self.value_buffer is None:
            return fork
        fork.key_buffer = rows_of(self.key_buffer[:, :, : self.length], rows)
        fork.value_buffer = rows_of(self.value_buffer[:, :, : self.length], rows)
        fork._foreign = True
        return fork


class BufferedCache(DynamicCache):  # type: ignore[misc]
    """A cache for a model of `config` whose layers of full attention are `BufferedLayer`s."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.layers: list[Any] = [
            BufferedLayer() if type(layer) is DynamicLayer else layer for layer in self.layers
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the tokens read, without the room behind them."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, BufferedLayer):
                total += layer.nbytes
                continue
            both = (getattr(layer, "keys", None), getattr(layer, "values", None))
            total += sum(t.numel() * t.element_size() for t in both if isinstance(t, Tensor))
        return total


def rows_of(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return `rows` of the first dimension; a view where they are all the same one."""
    if len(set(rows)) == 1:
        return tensor[rows[0] : rows[0] + 1].expand(len(rows), *tensor.shape[1:])
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))


def _grown(tensor: Tensor, length: int, capacity: int) -> Tensor:
    batch, heads, _, size = tensor.shape
    buffer = tensor.new_empty(batch, heads, capacity, size)
    buffer[:, :, :length] = tensor[:, :, :length]
    return buffer
