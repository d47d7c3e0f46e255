"""Streaming observers of activations: the range that a fixed 8-bit grid should cover.

Each observer is fed with the batches a layer sees during calibration and then names a range
`(low, high)`; no activation is kept. `min_max` and `moving_average` remember two numbers.
`percentile`, `mse` and `kl` share one `Histogram` and differ only in how they read it.

A range becomes a grid by `grid_of`: `value = scale * (q - zero_point)` with q in 0..255; symmetric
grids have zero_point 128. Zero is always on the grid, since padding and gates produce it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, get_args
from typing import Literal as Choice

import torch
from torch import Tensor, nn

from kernels.errors import ConfigError
from methods.affine import Affine, parameters

ObserverName = Choice["min_max", "moving_average", "percentile", "mse", "kl"]
OBSERVERS: tuple[str, ...] = get_args(ObserverName)

LEVELS = 256
SYMMETRIC_ZERO = 128
"""Zero point of a symmetric grid: a code is q + 128, as in `methods.affine`."""

BINS = 8192
"""Bins of a histogram: 2048 to 4096 of them lie between zero and the largest magnitude seen."""

KL_THRESHOLDS = 128
SMOOTHING = 1e-4
"""Probability given to a bin that the coarse distribution leaves empty, as in MXNet's calibration
(`python/mxnet/contrib/quantization.py`): without it the divergence is infinite."""


@dataclass(frozen=True)
class Grid:
    """A uniform 8-bit grid: `value = scale * (q - zero_point)`, q in 0..255."""

    scale: float
    zero_point: int


def grid_of(low: float, high: float, symmetric: bool) -> Grid:
    """Return the 8-bit grid that covers `low` to `high` and zero, its scale rounded to float32.

    Symmetric: scale = max(|low|, |high|) / 127, zero_point 128. Affine: scale = (high - low) / 255,
    zero_point = round(-low / scale).
    """
    scale, zero_point = _qparams(torch.tensor([low]), torch.tensor([high]), symmetric)
    return Grid(float(scale), int(zero_point))


def _qparams(low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, float64 [candidates] each, for ranges [candidates]."""
    affine = Affine(8, symmetric=symmetric, scale_dtype="float32")
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale, zero_point = parameters("activations", low, high, affine)
    zeros = torch.full_like(scale, SYMMETRIC_ZERO) if zero_point is None else zero_point
    return scale.double(), zeros.double()


class Observer(Protocol):
    """Sees batches of activations and names the range a grid should cover."""

    def observe(self, x: Tensor) -> None:
        """Take in a batch: floating tensor of any shape; raises ConfigError on NaN or infinity."""
        ...

    def range(self) -> tuple[float, float]:
        """Return (low, high); raises ConfigError where nothing was observed."""
        ...


def make_observer(
    name: ObserverName, percentile: float, averaging: float, symmetric: bool
) -> Observer:
    """Return a fresh observer.

    `percentile` (of `percentile`) and `averaging` (of `moving_average`) are ignored by the others;
    `symmetric` is the grid for which `mse` and `kl` search.
    """
    searches: dict[str, Callable[[Histogram], tuple[float, float]]] = {
        "percentile": lambda histogram: percentile_range(histogram, percentile),
        "mse": lambda histogram: mse_range(histogram, symmetric),
        "kl": lambda histogram: kl_range(histogram, symmetric),
    }
    if name == "min_max":
        return MinMax()
    if name == "moving_average":
        return MovingAverage(averaging)
    return FromHistogram(searches[name])


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Put the layer's name before the text of a ConfigError raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{layer}: {error}") from error


@torch.no_grad()
def observe_inputs(model: Any, calibration: Tensor, observers: Mapping[str, Observer]) -> None:
    """Show each observer the inputs of the module it is named after, in one pass over the text.

    `calibration` is int64 [samples, seq_len]; a sample is a batch. `model` is left as it was.

    Raises:
        ConfigError: a module's input is NaN or infinite; the sentence names the module.
    """
    watched = {name: model.get_submodule(name) for name in observers}
    # The head alone reads every position only where its input is wanted.
    kept = 0 if model.get_output_embeddings() in watched.values() else 1
    with ExitStack() as hooks:
        for name, module in watched.items():
            handle = module.register_forward_pre_hook(_watching(name, observers[name]))
            hooks.callback(handle.remove)
        for sample in calibration:
            model(input_ids=sample[None], use_cache=False, logits_to_keep=kept)


def _watching(name: str, observer: Observer) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        with named(name):
            observer.observe(inputs[0])

    return hook


def _extremes(x: Tensor) -> tuple[float, float]:
    if x.numel() == 0:
        raise ConfigError("calibration passed an empty batch; every batch must hold a token")
    low, high = (float(end) for end in torch.aminmax(x.detach().float()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(
            "calibration met activations that are NaN or infinite; "
            "check that the unquantized model gives a finite perplexity"
        )
    return low, high


def _seen(low: float, high: float) -> tuple[float, float]:
    if low > high:
        raise ConfigError("calibration never reached the layer: no range is known for it")
    return low, high


class MinMax:
    """The smallest and the largest value ever seen."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def observe(self, x: Tensor) -> None:
        """Widen the range to hold `x`."""
        low, high = _extremes(x)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self) -> tuple[float, float]:
        """Return what was seen."""
        return _seen(self.low, self.high)


class MovingAverage:
    """Exponential moving average of each batch's smallest and largest value.

    The observer of Jacob et al. 2018 (arXiv 1712.05877, section 3.1), written as PyTorch's
    MovingAverageMinMaxObserver has it: low += constant * (low of the batch - low). It depends by
    its nature on what a batch is; here a batch is one calibration sample.
    """

    def __init__(self, constant: float) -> None:
        self.constant = constant
        self.low, self.high = math.inf, -math.inf

    def observe(self, x: Tensor) -> None:
        """Move the range towards that of `x`; the first batch sets it."""
        low, high = _extremes(x)
        if self.low > self.high:
            self.low, self.high = low, high
        self.low += self.constant * (low - self.low)
        self.high += self.constant * (high - self.high)

    def range(self) -> tuple[float, float]:
        """Return the averages."""
        return _seen(self.low, self.high)


class Histogram:
    """How often each value was seen: `BINS` equal bins around zero, `2 ** exponent` wide.

    A value outside the bins doubles their width until it fits, merging neighbours. Since widths are
    powers of two the merged bins are exactly those a wider histogram would have counted: the result
    is the same, to the last count, however the data is cut into batches and ordered.

    Attributes:
        counts: int64 [BINS]; bin i covers (i - BINS / 2) * width up to the next one's start.
        low, high: exact smallest and largest value.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        # Narrow enough to be widened by whatever comes; 2 ** 100 still fits float32's range.
        self.exponent = -100
        self.low, self.high = math.inf, -math.inf

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    def add(self, x: Tensor) -> None:
        """Count the values of `x`, a floating tensor of any shape."""
        low, high = _extremes(x)
        self.low, self.high = min(self.low, low), max(self.high, high)
        # frexp: magnitude < 2 ** power, and BINS / 2 bins must reach that far.
        _, power = math.frexp(max(abs(low), abs(high)))
        self._widen(power - int(math.log2(BINS // 2)))
        scaled = x.detach().flatten().float() * math.ldexp(1.0, -self.exponent)
        bins = scaled.floor_().to(torch.int32).add_(BINS // 2)
        self.counts += torch.bincount(bins, minlength=BINS)

    def _widen(self, exponent: int) -> None:
        if exponent <= self.exponent:
            return
        # Beyond 31 places every bin falls into -1 or 0 anyway.
        places = min(exponent - self.exponent, 31)
        merged = (torch.arange(BINS) - BINS // 2 >> places) + BINS // 2
        self.counts = torch.zeros_like(self.counts).index_add_(0, merged, self.counts)
        self.exponent = exponent

    def points(self) -> tuple[Tensor, Tensor]:
        """Return the centre of each filled bin, inside low..high, and its count; float64 [n]."""
        filled = self.counts.nonzero().flatten()
        centres = (filled.double() - BINS // 2 + 0.5) * self.width
        return centres.clamp(self.low, self.high), self.counts[filled].double()

    def quantile(self, share: float) -> float:
        """Return the value below which `share` (0 to 1) of the data lies, linear inside a bin."""
        cumulated = self.counts.cumsum(0).double()
        target = share * float(cumulated[-1])
        index = min(int(torch.searchsorted(cumulated, target)), BINS - 1)
        count = float(self.counts[index])
        into = 1.0 - (float(cumulated[index]) - target) / count if count else 0.0
        value = (index - BINS // 2 + into) * self.width
        return min(max(value, self.low), self.high)


class FromHistogram:
    """An observer that fills a histogram and lets `search` choose the range from it."""

    def __init__(self, search: Callable[[Histogram], tuple[float, float]]) -> None:
        self.histogram = Histogram()
        self.search = search

    def observe(self, x: Tensor) -> None:
        """Count `x`."""
        self.histogram.add(x)

    def range(self) -> tuple[float, float]:
        """Search the histogram."""
        _seen(self.histogram.low, self.histogram.high)
        return self.search(self.histogram)


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """Return the range that leaves `100 - percentile` per cent of the values outside at each end.

    At 100 it is the smallest and the largest value.
    """
    share = percentile / 100
    return histogram.quantile(1 - share), histogram.quantile(share)


def mse_range(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    """Return the range whose 8-bit grid has the least mean squared error on the observed data.

    First one threshold clips both ends, then each end is moved alone, over shares of the observed
    range and then finely around the best. The observed range is the first candidate and the best
    so far stays one, so the error is at most min_max's.
    """
    coarse = 2.0 ** (-torch.arange(80, dtype=torch.float64) / 10)
    # From one coarse step below to one above; the first leaves the end where it is.
    fine = torch.cat([torch.ones(1), torch.linspace(0.93, 1.075, 59)]).double()
    low, high = histogram.low, histogram.high
    best = (low, high)
    for factors in (coarse, fine):
        bound = max(-best[0], best[1]) * factors
        best = _least_error(histogram, (-bound).clamp(min=low), bound.clamp(max=high), symmetric)
    if symmetric:
        return best
    for factors in (coarse, coarse, fine):
        for end, limit in ((1, high), (0, low)):
            start = best[end] if factors is fine else limit
            moved = torch.cat([torch.tensor([best[end]]).double(), start * factors])
            ends = [torch.full_like(moved, side) for side in best]
            ends[end] = moved.clamp(low, high)
            best = _least_error(histogram, ends[0], ends[1], symmetric)
    return best


def _least_error(
    histogram: Histogram, low: Tensor, high: Tensor, symmetric: bool
) -> tuple[float, float]:
    """Return the candidate range (float64 [candidates] each) of least squared error."""
    centres, counts = histogram.points()
    scale, zero_point = (part[:, None] for part in _qparams(low, high, symmetric))
    q = (centres / scale).round_().add_(zero_point).clamp_(0, LEVELS - 1)
    error = q.sub_(zero_point).mul_(scale).sub_(centres).square_() @ counts
    best = int(error.argmin())
    return float(low[best]), float(high[best])


def kl_range(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    """Return the range of least KL divergence between the clipped data and its 8-bit version.

    TensorRT's entropy calibration (S. Migacz, "8-bit Inference with TensorRT", GTC 2017): for each
    threshold the reference is the histogram inside it with the mass outside put into its outermost
    bins; the candidate is the same histogram without that mass, merged into 256 levels and spread
    again over the bins that were filled. Here both signs are kept (TensorRT takes magnitudes), the
    range ends at the data where that is nearer than the threshold, and 128 thresholds are tried.
    It was made for image models; the rare large activations of a language model carry much, and
    clipping them can cost more than a coarse grid does.
    Exact zeros, which gates and padding give and every grid holds, must not decide: the bin at zero
    counts no more than its neighbours, as in NVIDIA's pytorch-quantization (`bins[0] = bins[1]`).
    """
    centre = BINS // 2
    counts = histogram.counts.clone()
    counts[centre] = counts[centre].clamp(max=counts[[centre - 1, centre + 1]].max())
    start = centre + math.floor(histogram.low / histogram.width)
    stop = centre + math.floor(histogram.high / histogram.width) + 1
    largest = max(centre - start, stop - centre)
    best, best_divergence = largest, math.inf
    for threshold in _thresholds(largest):
        left, right = centre - threshold, centre + threshold
        if not symmetric:
            left, right = max(left, min(start, centre)), min(right, max(stop, centre))
        divergence = _divergence(counts, left, right)
        # On a tie the wider range: it clips nothing that the narrower one keeps.
        if divergence <= best_divergence:
            best, best_divergence = threshold, divergence
    bound = best * histogram.width
    return max(histogram.low, -bound), min(histogram.high, bound)


def _thresholds(largest: int) -> list[int]:
    """Return thresholds in bins, ascending; below 256 bins a grid is finer than the histogram."""
    smallest = min(LEVELS, largest)
    steps = KL_THRESHOLDS - 1
    return sorted({smallest + round((largest - smallest) * i / steps) for i in range(steps + 1)})


def _divergence(counts: Tensor, left: int, right: int) -> float:
    """Return KL(reference || candidate) in nats for the bins `left` to `right` of int64 counts."""
    inside = counts[left:right].double()
    if float(inside.sum()) == 0:
        return math.inf
    reference = inside.clone()
    reference[0] += float(counts[:left].sum())
    reference[-1] += float(counts[right:].sum())
    bins = inside.numel()
    level = torch.arange(bins) * LEVELS // bins
    filled = (inside > 0).double()
    mass = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, inside)
    members = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, filled)
    candidate = (mass / members.clamp(min=1))[level] * filled
    p, q = reference / reference.sum(), candidate / candidate.sum()
    return float(torch.where(p > 0, p * (p / q.clamp(min=SMOOTHING / bins)).log(), 0.0).sum())
