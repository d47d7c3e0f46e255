"""The tokens of a set of requests as tensors, so that the cells of a model share them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Pair = tuple[str, str]
"""A context and a continuation."""

TokenPair = tuple[list[int], list[int]]
"""The same as tokens."""


def packed(pairs: Sequence[Pair], tokens: Sequence[TokenPair]) -> dict[str, Tensor]:
    """Return the token lists as int32 tensors; a context that comes back is stored once."""
    contexts: dict[str, int] = {}
    for context, _ in pairs:
        contexts.setdefault(context, len(contexts))
    of_context = {context: ids for (context, _), (ids, _) in zip(pairs, tokens, strict=True)}
    return {
        "context": torch.tensor([contexts[context] for context, _ in pairs], dtype=torch.int32),
        **_flat("contexts", [of_context[context] for context in contexts]),
        **_flat("continuations", [ids for _, ids in tokens]),
    }


def unpacked(tensors: dict[str, Tensor]) -> list[TokenPair]:
    """Return what `packed` packed; requests of one context share its list."""
    contexts, continuations = _lists(tensors, "contexts"), _lists(tensors, "continuations")
    places = tensors["context"].tolist()
    return [(contexts[place], ids) for place, ids in zip(places, continuations, strict=True)]


def _flat(name: str, lists: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    return {
        name: torch.tensor([token for ids in lists for token in ids], dtype=torch.int32),
        f"{name}_lengths": torch.tensor([len(ids) for ids in lists], dtype=torch.int32),
    }


def _lists(tensors: dict[str, Tensor], name: str) -> list[list[int]]:
    ends = tensors[f"{name}_lengths"].numpy().cumsum()
    return [part.tolist() for part in np.split(tensors[name].numpy(), ends[:-1])]
