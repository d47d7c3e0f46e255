"""Perplexity of the evaluation text, under GPTQ's or llama.cpp's protocol.

Both give exp of the mean negative log-likelihood over all predictions; they differ in how the text
is joined and cut, and in which positions count (`harness.measures.windows`). Logits are float32,
sums are float64. A perplexity that overflows or is not a number is recorded as such. Windows whose
losses a measure before this one has left in the context are not read again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from harness.context import Context
from harness.measures.statistics import stderr_of_mean
from harness.measures.windows import (
    check_window_options,
    gptq_windows,
    llamacpp_windows,
    logit_pieces,
    row_slices,
)
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine, Scoring

PROTOCOLS = {"gptq": gptq_windows, "llamacpp": llamacpp_windows}


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over the windows of one protocol.

    Attributes:
        protocol: `gptq` or `llamacpp`.
        seq_len: tokens of a window; None is 2048 (gptq) or 512 (llamacpp), or the model's context.
        windows: how many windows from the start of the text are read; None is all.
        batch_size: windows read at once; methods that scale activations by a whole batch see a
            batch of one by default, as the protocols have it.
    """

    protocol: str
    seq_len: int | None = None
    windows: int | None = None
    batch_size: int = 1

    quality: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(
                f"perplexity's protocol is {self.protocol!r}; "
                f"it must be one of {', '.join(PROTOCOLS)}"
            )
        check_window_options(self.seq_len, self.windows, self.batch_size)

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return the perplexity with the mean loss of each window as samples.

        The standard error takes windows as the independent observations and follows the delta
        method: stderr(exp(m)) = exp(m) * stderr(m).
        """
        windows = PROTOCOLS[self.protocol](context, engine, self.seq_len, self.windows)
        losses: list[float] = []
        for start, ids in windows.batches(self.batch_size, engine.vocab_size):
            reader, known = context.losses.get(windows.batch_key(start, len(ids)), (None, []))
            if reader is engine and not isinstance(engine, Scoring):
                losses += known
            else:
                losses += mean_losses(token_losses(engine, ids, windows.first))
        perplexity = _exp(math.fsum(losses) / len(losses))
        stderr = stderr_of_mean(losses)
        return [
            Value(
                "perplexity",
                "perplexity",
                windows.protocol,
                perplexity,
                "perplexity",
                False,
                perplexity * stderr if stderr is not None and math.isfinite(perplexity) else None,
                tuple(losses),
            )
        ]


def _exp(mean: float) -> float:
    """Return exp(mean); infinity where that overflows, instead of Python's exception."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def mean_losses(per_token: Tensor) -> list[float]:
    """Return the mean of each window of float32 [B, n], summed in float64."""
    means: list[float] = per_token.mean(-1, dtype=torch.float64).tolist()
    return means


def token_losses(engine: Engine, ids: Tensor, first: int) -> Tensor:
    """Return the negative log-likelihood of each scored token.

    `ids` is int64 [B, T]; the predictions made at positions `first` to T - 2 count. The result is
    float32 [B, T - 1 - first] on the CPU, in nats.
    """
    if isinstance(engine, Scoring):
        scored = engine.token_log_likelihoods(ids)[:, first:]
        if bool(scored.isnan().any()):
            raise ConfigError(
                f"{engine.runtime} gives no log-probability of some tokens that this protocol "
                "scores (often the first behind BOS); use the llamacpp protocol with this engine"
            )
        return -scored
    batch, length = ids.shape
    losses = torch.empty(batch, length - 1 - first)
    for start, logits in logit_pieces(engine, ids, first):
        end = min(start + logits.shape[1], length - 1)  # the last position predicts no token
        targets = ids[:, start + 1 : end + 1].to(logits.device)
        for row in range(batch):
            for part in row_slices(end - start, logits.shape[2]):
                loss = functional.cross_entropy(
                    logits[row, part], targets[row, part], reduction="none"
                )
                at = slice(start - first + part.start, start - first + part.stop)
                losses[row, at] = loss.cpu()
    return losses
