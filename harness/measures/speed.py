"""Prefill and decoding speed at stated prompt lengths, context depths and batch sizes.

The engine and the baseline take turns in bursts (A B A B) in the same process, so that a ratio is
the median of ratios of neighbours in time. Raw samples stand in the values. Beside them stands what
tells whether they can be trusted: the spread of the token times, the machine's load, the first
burst against the last, and the bytes of weights read a second against the measured bandwidth.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any, ClassVar

import torch

from harness.context import Context
from harness.hardware import Hardware
from harness.measures.bandwidth import Bandwidth, measure_bandwidth, processor_cache_bytes
from harness.measures.execution import decoding, is_simulated
from harness.measures.memory import free_bytes, kept_bytes
from harness.measures.size import bytes_read_per_token
from harness.measures.statistics import relative_spread, stderr_of_median
from harness.measures.timing import Burst, Point, run_burst
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine

ABOVE_PEAK = 1.1
ATTEMPTS = 3
"""Bandwidth measured beside a busy neighbour is too low: so often it is measured again before a
decode rate above it is called impossible."""
SPARE_MEMORY = 2.0
"""A growing cache is copied into one of twice the room now and then."""


class ImpossibleSpeedError(Exception):
    """A decode rate that the memory cannot give: the timing is wrong."""


@dataclass(frozen=True)
class Speed:
    """Speed at every combination of prompt length, depth and batch size.

    Attributes:
        prompt_lengths: tokens of the timed prompts.
        depths: tokens in the context when decoding starts; None is as many as the prompt has.
        batches: sequences at once; a batch that does not fit into the memory is left out and said.
        decode_tokens: timed tokens of a burst.
        repeats: bursts of each engine.
        warmup: bursts of each engine before the timed ones.
        interleave_baseline: load the baseline too and take turns with it.
    """

    prompt_lengths: Sequence[int] = (128,)
    depths: Sequence[int] | None = None
    batches: Sequence[int] = (1,)
    decode_tokens: int = 32
    repeats: int = 5
    warmup: int = 1
    interleave_baseline: bool = True

    quality: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "cache"})

    def __post_init__(self) -> None:
        for name in ("prompt_lengths", "batches", "depths"):
            given = getattr(self, name)
            if given is None and name == "depths":
                continue
            if not given or min(given) < 1:
                raise ConfigError(f"speed's {name} is {list(given)}; it needs numbers of 1 or more")
            object.__setattr__(self, name, tuple(given))
        for name, least in (("decode_tokens", 1), ("repeats", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"speed's {name} is {getattr(self, name)}; it must be {least} or more"
                )

    def points(self) -> list[Point]:
        """Return the combinations to measure."""
        combinations = product(self.prompt_lengths, self.depths or (None,), self.batches)
        return [Point(prompt, depth or prompt, batch) for prompt, depth, batch in combinations]

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return speeds, ratios and their checks; nothing for weights only stored as floats.

        Raises:
            ConfigError: every point needs more tokens than the model reads.
            ImpossibleSpeedError: weights beyond the caches are read faster than memory gives them.
        """
        if is_simulated(engine):
            return []
        points, left_out = self._fitting(engine)
        with ExitStack() as stack:
            baseline = None
            if self.interleave_baseline and context.baseline is not None:
                baseline = context.baseline()
                stack.callback(baseline.close)
            return self._all_points(engine, baseline, points, left_out, context)

    def _all_points(
        self,
        engine: Engine,
        baseline: Engine | None,
        points: list[Point],
        left_out: list[str],
        context: Context,
    ) -> list[Value]:
        bandwidth = measure_bandwidth(context.hardware.device, free_bytes(context.hardware))
        per_token = kept_bytes(engine.prefill(torch.zeros(1, 1, dtype=torch.int64), last=1)[1])
        details: dict[str, Any] = {
            "interleaved_with_baseline": baseline is not None,
            "decoding": decoding(engine),
            "baseline_decoding": None if baseline is None else decoding(baseline),
            "warmup_bursts": self.warmup,
            "bursts": self.repeats,
            "copy": "torch copy_, bytes read + bytes written",
            "read_bytes_per_second": bandwidth.read,
            "left_out": left_out,
            "points": [],
        }
        context.details["speed"] = details
        values: list[Value] = []
        for point in points:
            reason = _does_not_fit(per_token, point, self.decode_tokens, context.hardware)
            if reason:
                left_out.append(f"{point.protocol}: {reason}")
                continue
            values += self._measure(engine, baseline, point, context, bandwidth)
        return values

    def _fitting(self, engine: Engine) -> tuple[list[Point], list[str]]:
        """Return the points inside the model's context, and a sentence for each of the others.

        Raises:
            ConfigError: all are outside.
        """
        fitting: list[Point] = []
        others: list[str] = []
        for point in self.points():
            wanted = max(point.prompt, point.depth + self.decode_tokens)
            if wanted <= engine.context_length:
                fitting.append(point)
                continue
            others.append(
                f"{point.protocol}: with {self.decode_tokens} decoded tokens it needs a context "
                f"of {wanted} tokens, but the model has {engine.context_length}"
            )
        if not fitting:
            raise ConfigError(f"speed has no point to measure; {others[0]}")
        return fitting, others

    def _measure(
        self,
        engine: Engine,
        baseline: Engine | None,
        point: Point,
        context: Context,
        bandwidth: Bandwidth,
    ) -> list[Value]:
        device = context.hardware.device
        ids = point.ids(engine.vocab_size, context.seed)
        engines = [engine] if baseline is None else [engine, baseline]
        load_before = os.getloadavg()[0]
        bursts: list[list[Burst]] = [[] for _ in engines]
        for turn in range(self.warmup + self.repeats):
            for one, found in zip(engines, bursts, strict=True):
                burst = run_burst(one, point, ids, self.decode_tokens, device)
                if turn >= self.warmup:
                    found.append(burst)
        own = bursts[0]
        values = _speeds(point, own)
        if baseline is not None:
            values += _ratios(point, own, bursts[1], context.seed)
        read = bytes_read_per_token(engine, context.artefact)
        step = median(t for burst in own for t in burst.tokens)
        if read is not None:
            bandwidth = _plausible(read, step, bandwidth, point, context.hardware)
            values.append(_value("achieved_bytes_per_second", point, read / step, "B/s", None))
        values.append(_value("copy_bytes_per_second", point, bandwidth.copy, "B/s", None))
        medians = [median(burst.tokens) for burst in own]
        context.details["speed"]["points"].append(
            {
                "protocol": point.protocol,
                "load_average": [load_before, os.getloadavg()[0]],
                "median_tpot_seconds_of_bursts": medians,
                "last_burst_over_first": medians[-1] / medians[0],
                "weight_bytes_per_token": read,
                "weights_fit_into_caches": None
                if read is None
                else read <= processor_cache_bytes(device),
            }
        )
        return values


def _value(
    metric: str,
    point: Point,
    value: float,
    unit: str,
    higher: bool | None,
    samples: Sequence[float] = (),
    stderr: float | None = None,
) -> Value:
    return Value("speed", metric, point.protocol, value, unit, higher, stderr, tuple(samples))


def _speeds(point: Point, bursts: list[Burst]) -> list[Value]:
    first = [burst.first for burst in bursts]
    tokens = [seconds for burst in bursts for seconds in burst.tokens]
    prompt = point.batch * point.prompt
    return [
        _value("ttft_seconds", point, median(first), "s", False, first),
        _value("prefill_tokens_per_second", point, prompt / median(first), "tokens/s", True),
        _value("tpot_seconds", point, median(tokens), "s", False, tokens),
        _value("decode_tokens_per_second", point, point.batch / median(tokens), "tokens/s", True),
        _value("timing_spread", point, relative_spread(tokens), "ratio", None),
    ]


def _ratios(point: Point, own: list[Burst], other: list[Burst], seed: int) -> list[Value]:
    """Return how many times faster than the baseline, from bursts that followed each other."""
    pairs = list(zip(own, other, strict=True))
    prefill = [theirs.first / ours.first for ours, theirs in pairs]
    decode = [median(theirs.tokens) / median(ours.tokens) for ours, theirs in pairs]
    return [
        _value(metric, point, median(ratios), "ratio", True, ratios, stderr_of_median(ratios, seed))
        for metric, ratios in (("prefill_speedup", prefill), ("decode_speedup", decode))
    ]


def _plausible(
    read: int, seconds: float, bandwidth: Bandwidth, point: Point, hardware: Hardware
) -> Bandwidth:
    """Return the bandwidth, measured again where `read` bytes in `seconds` exceed it.

    At most the caches' capacity of those bytes can have come from elsewhere than memory.

    Raises:
        ImpossibleSpeedError: the others came faster than memory gives them.
    """
    from_memory = (read - processor_cache_bytes(hardware.device)) / seconds
    for attempt in range(ATTEMPTS + 1):
        if from_memory <= ABOVE_PEAK * bandwidth.ceiling:
            return bandwidth
        if attempt < ATTEMPTS:
            again = measure_bandwidth(hardware.device, free_bytes(hardware))
            bandwidth = Bandwidth(max(bandwidth.copy, again.copy), max(bandwidth.read, again.read))
    raise ImpossibleSpeedError(
        f"decoding at {point.protocol} would read weights at {from_memory / 1e9:.1f} GB/s, above "
        f"the {bandwidth.ceiling / 1e9:.1f} GB/s that the memory gives: the timing is wrong"
    )


def _does_not_fit(
    per_token: int | None, point: Point, tokens: int, hardware: Hardware
) -> str | None:
    """Return why the keys and values of `point` do not fit into the memory, or None.

    `per_token` is their bytes for one token of one sequence, None where the engine hides them.
    """
    if per_token is None:
        return None
    wanted = SPARE_MEMORY * point.batch * (max(point.prompt, point.depth) + tokens) * per_token
    free = free_bytes(hardware)
    if wanted <= free:
        return None
    return f"its cache would take {wanted / 2**20:,.0f} MiB of {free / 2**20:,.0f} MiB free"
