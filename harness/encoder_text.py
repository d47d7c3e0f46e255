"""Sentences of the evaluation text, as an encoder reads them.

Rows are cut into lines, and lines behind a full stop, question or exclamation mark. What counts are
the first different ones, from the start of the text, whose tokens (the tokenizer's own special ones
included) are neither too few nor too many. Batches are padded on the right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.context import Context
from harness.data import tokenizer_digest
from harness.record import digest
from kernels.errors import ConfigError

SHORTEST, LONGEST = 8, 128
FEWEST = 4
"""Below this many sentences there are no similarities to rank."""

BEHIND_A_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Sentences:
    """Tokenized sentences.

    Attributes:
        ids: the tokens of each, special ones included.
        pad: the id that fills the places behind a shorter sentence.
        protocol: name of the text, how many sentences, and their lengths.
        digest: identity of the tokens.
    """

    ids: tuple[tuple[int, ...], ...]
    pad: int
    protocol: str
    digest: str

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens and mask, int64 [B, T] each, of `size` sentences at a time."""
        for start in range(0, len(self.ids), size):
            yield padded(self.ids[start : start + size], self.pad)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return tokens and mask, int64 [B, T] each, of `rows` filled up on the right."""
    width = max(map(len, rows))
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def split(rows: Sequence[str]) -> list[str]:
    """Return the different sentences of `rows`, in order."""
    found = (
        piece.strip()
        for row in rows
        for line in row.splitlines()
        for piece in BEHIND_A_SENTENCE.split(line)
    )
    return list(dict.fromkeys(piece for piece in found if piece))


def sentences_of(context: Context, count: int, longest: int) -> Sentences:
    """Return the first `count` sentences of the evaluation text, fewer where it has no more.

    `longest` is the most tokens the model reads.

    Raises:
        ConfigError: the model has no tokenizer, or the text too few sentences.
    """
    tokenizer = context.tokenizer
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer, so no sentences can be read with it")
    longest = min(LONGEST, longest)
    source = context.texts.source
    ids: list[tuple[int, ...]] = []
    for sentence in split(source.rows()):
        if len(ids) == count:
            break
        tokens = tokenizer(sentence, verbose=False).input_ids
        if SHORTEST <= len(tokens) <= longest:
            ids.append(tuple(tokens))
    if len(ids) < FEWEST:
        raise ConfigError(
            f"text {source.text!r} has {len(ids)} sentences of {SHORTEST} to {longest} tokens, and "
            f"at least {FEWEST} are needed; take a longer text (data.source, data.path)"
        )
    protocol = f"{source.text}_sentences{len(ids)}"
    pad = tokenizer.pad_token_id
    key = [context.texts.digest, tokenizer_digest(tokenizer), len(ids), longest]
    return Sentences(tuple(ids), 0 if pad is None else int(pad), protocol, digest(key))


def frame(tokens: Tensor, tokenizer: Any) -> Tensor:
    """Return crops int64 [samples, seq_len] with the tokenizer's special tokens at their ends.

    An encoder never reads a text without them, and their activations are the largest of all; they
    take the places of the first and the last tokens.
    """
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    before = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    behind = len(whole) - before - len(bare)
    if tokens.shape[1] <= before + behind:
        return tokens
    framed = tokens.clone()
    framed[:, :before] = torch.tensor(whole[:before], dtype=tokens.dtype)
    if behind:
        framed[:, -behind:] = torch.tensor(whole[-behind:], dtype=tokens.dtype)
    return framed
