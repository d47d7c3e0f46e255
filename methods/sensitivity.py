"""How much a model's predictions change when one of its matrices alone is quantized.

Per matrix and scheme the mean KL(reference ‖ candidate) per scored token, over the whole
vocabulary, and the change of the mean cross entropy, in nats, with all other matrices as they are
(Dong et al. 2019, HAWQ, and the layer sweeps of llama.cpp ask the same of other measures). Windows
are read one at a time and each is run by every candidate from the block that it changes on
(`methods.prefix`), so what is kept is one window's: the states between its blocks, and the
reference's log-probabilities [T - 1, V] in float32. All is computed in float32; activations stay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Matrix
from methods.divergence import divergence_terms
from methods.prefix import Prefixed


def _quiet(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Divergences:
    """What N candidates did to W windows, float64 on the CPU.

    Attributes:
        kl: [N, W] mean KL(reference ‖ candidate) per scored token, nats; infinite where a logit of
            the candidate is not finite.
        loss: [N, W] mean cross entropy of the candidate less that of the reference, nats.
        block_forwards: block calls, one window each; `without_prefixes`: had each candidate run
            all blocks.
    """

    kl: Tensor
    loss: Tensor
    block_forwards: int
    without_prefixes: int


@dataclass(frozen=True)
class Table:
    """Sensitivities of M matrices to C schemes, float64 on the CPU.

    Attributes:
        names: of the matrices.
        schemes: their labels.
        kl: [M, C] mean KL(reference ‖ model with that one matrix quantized) per scored token,
            nats; NaN where a scheme does not cover a matrix.
        kl_stderr: [M, C] its standard error over windows; NaN for one window.
        loss: [M, C] change of the mean cross entropy, nats.
        noise_floor: KL of the reference run again as candidates are, from its middle block on.
            Exactly 0 on a processor in float32, where a window is computed the same way twice.
        batch_floor: KL of the reference with two windows in a forward, where sums are taken in
            another order.
        cost: `candidates`, `block_forwards`, `block_forwards_without_prefixes`, `seconds`.
    """

    names: tuple[str, ...]
    schemes: tuple[str, ...]
    kl: Tensor
    kl_stderr: Tensor
    loss: Tensor
    noise_floor: float
    batch_floor: float
    cost: dict[str, Any]


def measure(
    model: Any,
    matrices: Sequence[Matrix],
    schemes: Mapping[str, Mapping[str, nn.Module]],
    tokens: Tensor,
    say: Callable[[str], None] = _quiet,
) -> Table:
    """Return what each of `matrices` alone does to `model` in each of `schemes`.

    `schemes` is label -> (matrix -> packed module, as `LayerwiseMethod.modules` returns them);
    `model` is float32 in eval mode and left as it was; `tokens` is int64 [windows, T].
    """
    start = time.perf_counter()
    names, labels = [matrix.name for matrix in matrices], list(schemes)
    asked = [
        (row, column)
        for row, name in enumerate(names)
        for column, label in enumerate(labels)
        if name in schemes[label]
    ]
    singles = [{names[r]: schemes[labels[c]][names[r]]} for r, c in asked]
    # Nothing replaced: the reference again, in the way candidates run.
    found = divergences(model, [*singles, {}], tokens, say)
    table = torch.full((3, len(names), len(labels)), torch.nan, dtype=torch.float64)
    errors = stderr(found.kl)
    for number, (row, column) in enumerate(asked):
        figures = (found.kl[number].mean(), errors[number], found.loss[number].mean())
        table[:, row, column] = torch.stack(figures)
    cost = {
        "candidates": len(singles),
        "block_forwards": found.block_forwards,
        "block_forwards_without_prefixes": found.without_prefixes,
        "seconds": time.perf_counter() - start,
    }
    floor = float(found.kl[-1].mean())
    batch = _batch_floor(model, tokens)
    return Table(tuple(names), tuple(labels), table[0], table[1], table[2], floor, batch, cost)


def kl_of(
    model: Any, replaced: Mapping[str, nn.Module], tokens: Tensor
) -> tuple[float, float, float]:
    """Return mean KL, its standard error and the loss change with all of `replaced` at once.

    Arguments and units as in `measure`; the standard error is NaN for one window.
    """
    found = divergences(model, [replaced], tokens)
    return float(found.kl.mean()), float(stderr(found.kl)[0]), float(found.loss.mean())


def divergences(
    model: Any,
    candidates: Sequence[Mapping[str, nn.Module]],
    tokens: Tensor,
    say: Callable[[str], None] = _quiet,
) -> Divergences:
    """Return what each of `candidates` (matrix -> packed module) does to int64 `tokens` [W, T].

    One that replaces nothing is run from the middle block on.
    """
    runner = Prefixed(model)
    entries = [runner.entry(list(one)) if one else runner.blocks // 2 for one in candidates]
    shape = (len(candidates), len(tokens))
    kl, loss = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    for window, ids in enumerate(tokens.to(model.device)):
        say(f"window {window + 1} of {len(tokens)}, candidates: {len(candidates)}")
        logits, states = runner.reference(ids[None])
        expected, targets = _scored(logits), ids[1:, None]
        before = -expected.gather(1, targets).double().mean()
        del logits
        for number, replaced in enumerate(candidates):
            logits = runner.resume(ids[None], states, entries[number], replaced)
            found = _scored(logits)
            kl[number, window] = _mean_kl(expected, found)
            loss[number, window] = -found.gather(1, targets).double().mean() - before
    plain = (len(candidates) + 1) * runner.blocks * len(tokens)
    return Divergences(kl, loss, runner.forwards, plain)


def stderr(samples: Tensor) -> Tensor:
    """Return the standard error [N] of the means of [N, W]; NaN for one window."""
    if samples.shape[1] == 1:
        return torch.full_like(samples[:, 0], torch.nan)
    return samples.std(1) / math.sqrt(samples.shape[1])


def _scored(logits: Tensor) -> Tensor:
    """Return log-probabilities [T - 1, V] of the tokens behind the first, of logits [1, T, V]."""
    return logits[0, :-1].log_softmax(-1)


def _mean_kl(expected: Tensor, found: Tensor) -> float:
    """Return the mean KL per token of log-probabilities [N, V]; infinite where one is NaN."""
    terms = divergence_terms(expected.exp(), found.exp(), found - expected)
    mean = float(terms.sum(-1, dtype=torch.float64).mean())
    return mean if mean == mean else float("inf")


def _batch_floor(model: Any, tokens: Tensor) -> float:
    """Return the mean KL of the first window from itself with the second beside it."""
    runner = Prefixed(model)
    first = tokens[:1].to(model.device)
    alone, _ = runner.reference(first)
    pair, _ = runner.reference(torch.cat([first, tokens[-1:].to(model.device)]))
    return _mean_kl(_scored(alone), _scored(pair[:1]))
