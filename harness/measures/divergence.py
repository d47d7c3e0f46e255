"""How far an engine's predictions are from the unquantized model's, token by token.

Per scored token the exact KL(reference ‖ engine) over the whole vocabulary (float32 softmax,
float64 sums), streamed window by window over the windows of GPTQ's perplexity protocol. Beside it
stands a noise floor: the divergence of the unquantized model from itself when it is run again in
the cell's own floating type, or in another batch shape where that type is the reference's. The
losses of the same windows are left for a perplexity that is measured after it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from harness.context import Context
from harness.hardware import Hardware
from harness.measures.kept_logits import KeptLogits, keep_logits
from harness.measures.perplexity import mean_losses
from harness.measures.statistics import empirical_quantile, stderr_of_mean
from harness.measures.windows import (
    Windows,
    check_window_options,
    gptq_windows,
    logit_pieces,
    row_slices,
)
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine
from methods.divergence import divergence_terms
from methods.engine import TorchEngine
from methods.unquantized import DTYPES

NOISE_KIND = "noise_floor"


@dataclass(frozen=True)
class TokenDivergence:
    """What is known of each of N scored tokens.

    Attributes:
        kl: float64 [N], nats; infinite where the engine's logits are not all finite.
        agree: float64 [N], 1 where both put the same token first, else 0.
        delta_p: float64 [N], probability of the target token, engine minus reference.
        difference: float64 [N], mean absolute difference of the logits.
        loss: float32 [N], negative log-likelihood of the target token by the engine, nats; means
            nothing where a logit is not finite.
        nonfinite: number of logits of the engine that are NaN or infinite.
    """

    kl: Tensor
    agree: Tensor
    delta_p: Tensor
    difference: Tensor
    loss: Tensor
    nonfinite: int


def token_divergence(reference: Tensor, logits: Tensor, targets: Tensor) -> TokenDivergence:
    """Compare float32 `logits` [N, V] with float32 `reference` [N, V], which is finite.

    `targets` is int64 [N]. A token with a NaN or infinite logit has no distribution to compare:
    it counts with infinite divergence and difference, as a disagreement, and with probability 0
    for its target. So no token is dropped, and a broken engine cannot look good.
    """
    # NaN is the least and the largest wherever it is, so two passes without a copy tell.
    broken = ~(torch.isfinite(logits.amax(-1)) & torch.isfinite(logits.amin(-1)))
    agree = (reference.argmax(-1) == logits.argmax(-1)) & ~broken
    nonfinite = 0
    if bool(broken.any()):
        nonfinite = int((~torch.isfinite(logits)).sum())
        logits = torch.where(broken[:, None], 0.0, logits)
    expected, found = reference.log_softmax(-1), logits.log_softmax(-1)
    share = expected.exp()
    kl = divergence_terms(share, found.exp(), found - expected).sum(-1, dtype=torch.float64)
    difference = (reference - logits).abs().mean(-1, dtype=torch.float64)
    of_target = found.gather(1, targets[:, None])
    probability = of_target.exp().double()[:, 0]
    delta_p = probability.masked_fill(broken, 0.0) - share.gather(1, targets[:, None])[:, 0]
    return TokenDivergence(
        kl.masked_fill(broken, torch.inf),
        agree.double(),
        delta_p,
        difference.masked_fill(broken, torch.inf),
        -of_target[:, 0],
        nonfinite,
    )


@dataclass(frozen=True)
class Divergence:
    """Divergence from the unquantized model over the windows of the GPTQ protocol.

    Attributes:
        seq_len: tokens of a window; None is 2048, or the model's context if shorter.
        windows: how many windows from the start of the text are read; None is all.
        batch_size: windows the engine reads at once.
    """

    seq_len: int | None = None
    windows: int | None = None
    batch_size: int = 1

    quality: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __post_init__(self) -> None:
        check_window_options(self.seq_len, self.windows, self.batch_size)

    def prepare(self, reference: Engine, context: Context) -> None:
        """Keep the reference's outputs and the noise floor of the cell's floating type."""
        windows = gptq_windows(context, reference, self.seq_len, self.windows)
        keep_logits(reference, context, windows)
        context.keep_reference(
            NOISE_KIND,
            self._noise_key(windows, context.hardware),
            lambda: {"kl": self._noise_floor(reference, context, windows)},
        )

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return the divergences; samples are the means of each window."""
        windows = gptq_windows(context, engine, self.seq_len, self.windows)
        noise = context.reference(NOISE_KIND, self._noise_key(windows, context.hardware))
        batches = windows.batches(self.batch_size, engine.vocab_size)
        found = _WindowSums()
        losses: list[Tensor] = []
        for per_window in _compare(engine, context, windows, batches):
            found.add(per_window)
            losses.append(torch.cat([part.loss for part in per_window]).cpu())
        if found.nonfinite == 0:
            for start, ids in windows.batches(self.batch_size, engine.vocab_size):
                means = mean_losses(torch.stack(losses[start : start + len(ids)]))
                context.losses[windows.batch_key(start, len(ids))] = engine, means
        return found.values(windows.protocol, noise["kl"].tolist())

    def _noise_key(self, windows: Windows, hardware: Hardware) -> list[Any]:
        shape = [windows.digest, windows.length, len(windows.ids), self.batch_size]
        return [*shape, hardware.compute_dtype, hardware.device]

    def _noise_floor(self, reference: Engine, context: Context, windows: Windows) -> Tensor:
        """Return the mean divergence of each window, float64 [windows], of a second run."""
        converted = _in_dtype(reference, context.hardware)
        if converted is None:
            batches = _other_shape(windows, self.batch_size + 1)
        else:
            batches = windows.batches(self.batch_size, reference.vocab_size)
        means = [
            torch.cat([part.kl for part in parts]).mean()
            for parts in _compare(converted or reference, context, windows, batches)
        ]
        return torch.stack(means).cpu()


def _in_dtype(reference: Engine, hardware: Hardware) -> TorchEngine | None:
    """Return the reference in the hardware's floating type; None where it is in that type."""
    if not isinstance(reference, TorchEngine):
        raise ConfigError("the noise floor needs the unquantized model as a PyTorch module")
    dtype = DTYPES[hardware.compute_dtype]
    parameters = list(reference.model.parameters())
    if all(parameter.dtype == dtype for parameter in parameters):
        return None
    # Only parameters are converted: transformers keeps buffers such as rotary frequencies in
    # float32. FP16 on a CPU is stored in FP16 and computed in FP32 (`methods.unquantized`).
    emulated = dtype == torch.float16 and hardware.device == "cpu"
    memo: dict[int, Any] = {}
    for parameter in parameters:
        values = parameter.detach().to(dtype)
        values = values.float() if emulated else values
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    return TorchEngine(copy.deepcopy(reference.model, memo), hardware.device, [])


def _other_shape(windows: Windows, size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first window, int64 [size, T]): every forward reads `size` windows.

    The last batch is filled up with windows from the start of the text.
    """
    count = len(windows.ids)
    for start in range(0, count, size):
        yield start, windows.ids[torch.arange(start, start + size) % count]


def _compare(
    engine: Engine,
    context: Context,
    windows: Windows,
    batches: Iterator[tuple[int, Tensor]],
) -> Iterator[list[TokenDivergence]]:
    """Yield, for each window in order, its divergences in pieces of consecutive tokens."""
    kept: KeptLogits | None = None
    for index, ids in batches:
        rows = range(min(len(ids), len(windows.ids) - index))
        entries: list[dict[str, Tensor]] = []
        parts: list[list[TokenDivergence]] = [[] for _ in rows]
        for start, logits in logit_pieces(engine, ids, 0):
            if kept is None:
                kept = KeptLogits.of(context, windows, logits.device)
            entries = entries or [kept.window(index + row) for row in rows]
            end = min(start + logits.shape[1], windows.length - 1)
            for row in rows:
                for part in row_slices(end - start, logits.shape[2]):
                    positions = slice(start + part.start, start + part.stop)
                    targets = ids[row, positions.start + 1 : positions.stop + 1]
                    expected = kept.logits(entries[row], positions, logits.device)
                    found = token_divergence(expected, logits[row, part], targets.to(logits.device))
                    parts[row].append(found)
        yield from parts


class _WindowSums:
    """Collects the tokens of window after window."""

    def __init__(self) -> None:
        self.kl: list[np.ndarray[Any, np.dtype[np.float64]]] = []
        self.means: dict[str, list[float]] = {}
        self.nonfinite = 0

    def add(self, parts: list[TokenDivergence]) -> None:
        """Add one window's tokens."""
        kl = torch.cat([part.kl for part in parts])
        delta_p = torch.cat([part.delta_p for part in parts])
        of_tokens = {
            "kl_mean": kl,
            "top1_agreement": torch.cat([part.agree for part in parts]),
            "delta_p_mean": delta_p,
            "delta_p_squared": delta_p.square(),
            "mean_absolute_logit_difference": torch.cat([part.difference for part in parts]),
        }
        for metric, tokens in of_tokens.items():
            self.means.setdefault(metric, []).append(float(tokens.mean()))
        self.kl.append(kl.cpu().numpy())
        self.nonfinite += sum(part.nonfinite for part in parts)

    def values(self, protocol: str, noise: list[float]) -> list[Value]:
        """Return all metrics; `noise` is the mean divergence of each window of the second run."""
        kl = np.concatenate(self.kl)
        rms = float(np.sqrt(np.mean(self.means.pop("delta_p_squared"))))

        def of_windows(metric: str, unit: str, higher: bool | None, samples: list[float]) -> Value:
            mean, stderr = float(np.mean(samples)), stderr_of_mean(samples)
            return Value("divergence", metric, protocol, mean, unit, higher, stderr, tuple(samples))

        def plain(metric: str, value: float, unit: str) -> Value:
            return Value("divergence", metric, protocol, value, unit, False)

        return [
            of_windows("kl_mean", "nats", False, self.means["kl_mean"]),
            plain("kl_median", empirical_quantile(kl, 0.5), "nats"),
            plain("kl_p90", empirical_quantile(kl, 0.9), "nats"),
            plain("kl_p99", empirical_quantile(kl, 0.99), "nats"),
            of_windows("top1_agreement", "share", True, self.means["top1_agreement"]),
            of_windows("delta_p_mean", "share", None, self.means["delta_p_mean"]),
            plain("delta_p_rms", rms, "share"),
            of_windows(
                "mean_absolute_logit_difference",
                "logits",
                False,
                self.means["mean_absolute_logit_difference"],
            ),
            plain("nonfinite_logits", float(self.nonfinite), "logits"),
            of_windows("kl_noise_floor", "nats", None, noise),
        ]
