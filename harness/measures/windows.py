"""Evaluation text as windows of tokens, and the logits of a window in bounded memory.

Source of the two protocols: GPTQ's evaluation (Frantar et al. 2022, `datautils.py`, `opt.py`) and
llama.cpp's `tools/perplexity`. Perplexity and divergence read the same windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harness import data
from harness.context import Context
from kernels.errors import ConfigError
from methods.base import Engine

GPTQ_LENGTH = 2048
LLAMACPP_LENGTH = 512
LOGITS_BYTES = 1 << 31
PIECE_BYTES = 1 << 26
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Windows:
    """Windows of equal length cut from one text.

    Attributes:
        ids: int64 [windows, tokens].
        first: the first position whose next token is scored; the last but one is the last.
        protocol: name of text, protocol and length, part of every metric taken on these windows.
        digest: identity of the tokens that the windows were cut from.
    """

    ids: Tensor
    first: int
    protocol: str
    digest: str

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.ids.shape[1]

    def batches(self, batch_size: int, vocab_size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the first window, int64 [B, tokens]) with bounded logits.

        At most `batch_size` windows at once, fewer where their logits would exceed LOGITS_BYTES.
        """
        logits_bytes = (self.length - self.first) * vocab_size * FLOAT_BYTES
        size = max(1, min(batch_size, LOGITS_BYTES // logits_bytes))
        for start in range(0, len(self.ids), size):
            yield start, self.ids[start : start + size]

    def batch_key(self, start: int, count: int) -> tuple[Any, ...]:
        """Return the identity of `count` windows from `start` that are read together and scored."""
        return self.digest, self.length, self.first, start, count


def gptq_windows(
    context: Context, engine: Engine, seq_len: int | None, limit: int | None
) -> Windows:
    """Return windows without overlap, tail dropped, every token but a window's first predicted.

    `seq_len` None is 2048, or the engine's context where that is shorter; `limit` None is all.

    Raises:
        ConfigError: the engine reads fewer tokens, or the text has less than one window.
    """
    length = _length(seq_len, GPTQ_LENGTH, engine)
    tokens = context.texts.tokens("gptq")
    protocol = _protocol(tokens, "gptq", length, limit)
    return Windows(data.windows(tokens, length, limit), 0, protocol, tokens.digest)


def llamacpp_windows(
    context: Context, engine: Engine, seq_len: int | None, limit: int | None
) -> Windows:
    """Return llama.cpp's chunks, of which the second half is scored.

    The first token of each is replaced by BOS where the model uses one. With 512 tokens, the
    default, the predictions at positions 256 to 510 count: 255 a chunk.

    Raises:
        ConfigError: the engine reads fewer tokens, or the text has less than one window.
    """
    length = _length(seq_len, LLAMACPP_LENGTH, engine)
    tokens = context.texts.tokens("llamacpp")
    ids = data.windows(tokens, length, limit)
    if tokens.bos is not None:
        ids = ids.clone()
        ids[:, 0] = tokens.bos
    protocol = _protocol(tokens, "llamacpp", length, limit)
    return Windows(ids, length // 2, protocol, tokens.digest)


def _length(wanted: int | None, usual: int, engine: Engine) -> int:
    if wanted is None:
        return min(usual, engine.context_length)
    if wanted > engine.context_length:
        raise ConfigError(
            f"seq_len is {wanted}, but the model reads at most {engine.context_length} tokens"
        )
    return wanted


def _protocol(tokens: data.Tokens, name: str, length: int, limit: int | None) -> str:
    protocol = f"{tokens.text}_{name}_{length}"
    if limit is None or limit >= len(tokens.ids) // length:
        return protocol
    return f"{protocol}_first{limit}"


def check_window_options(seq_len: int | None, windows: int | None, batch_size: int) -> None:
    """Raise ConfigError where an option of a measure over windows makes no sense."""
    if seq_len is not None and seq_len < 2:
        raise ConfigError(f"seq_len is {seq_len}; it must be 2 or more, or null")
    if windows is not None and windows < 1:
        raise ConfigError(f"windows is {windows}; it must be 1 or more, or null for all")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more")


def logit_pieces(engine: Engine, ids: Tensor, first: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (position, float32 logits [B, n, V]) for the positions from `first` on, in order.

    `ids` is int64 [B, T]. One forward where its logits fit into LOGITS_BYTES; otherwise the
    tokens are read piece by piece behind a kept cache, where the engine has one.
    """
    batch, length = ids.shape
    fitting = max(1, LOGITS_BYTES // (batch * engine.vocab_size * FLOAT_BYTES))
    if length - first <= fitting or "cache" not in engine.capabilities:
        yield first, engine.prefill(ids, last=length - first)[0]
        return
    cache = None
    if first > 0:
        _, cache = engine.prefill(ids[:, :first], last=1)
    for start in range(first, length, fitting):
        logits, cache = engine.prefill(ids[:, start : start + fitting], cache)
        yield start, logits


def row_slices(rows: int, width: int) -> Iterator[slice]:
    """Yield slices of `rows` so that a float32 copy of `width` columns stays under PIECE_BYTES."""
    step = max(1, PIECE_BYTES // (width * FLOAT_BYTES))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
