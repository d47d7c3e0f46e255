"""Times of calls that take turns, and the bandwidth of a plain copy on the same machine.

On a processor each call is timed by itself, the contenders one after another in every round, so
that a machine that slows down slows all of them. A short call comes after some of its own that are
not counted: the threads of another library's pool, whose turn it was before, go on spinning for
milliseconds when their work is done. On a card a CUDA graph of some calls is replayed
between two events, again in turns: launches cost what they cost in a graphed decode step. What
cannot be captured is timed between events without a graph, and the row says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

FEWEST_ROUNDS = 5
SLOW_ROUNDS, PATIENCE = 3, 10
MOST_ROUNDS = 100
GRAPH_SECONDS = 2e-3
"""Length of a graph: events resolve half a microsecond."""

SETTLE_SECONDS = 5e-3
"""Calls shorter than this are repeated for so long before one is timed."""

WARM_SECONDS = 0.5
"""Longest time for a call on each copy before any is timed."""

COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
COPY_ROUNDS = 10
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 32 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, sample by sample, and how they were taken."""

    samples: tuple[float, ...]
    how: str

    @property
    def median(self) -> float:
        """Middle of the samples."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance of the quartiles; 0 for one sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low


def cache_bytes(device: str) -> int:
    """Return the size of the last cache before memory."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties().L2_cache_size)
    sizes = [parse_size(file.read_text()) for file in CACHES.glob("index*/size")]
    return max(sizes, default=UNKNOWN_CACHE)


def parse_size(text: str) -> int:
    """Return the bytes of a size as the kernel writes it: `32768K`."""
    text = text.strip()
    units = {"K": 10, "M": 20, "G": 30}
    return int(text[:-1]) << units[text[-1]] if text[-1] in units else int(text)


def copy_bandwidth(device: str, nbytes: int | None = None) -> Timing:
    """Return bytes per second of copying a large buffer, read and written bytes together."""
    source = torch.ones((nbytes or COPY_BYTES[device]) // 4, device=device)
    target = source.clone()  # written once, so that no page is touched for the first time below
    timing = time_calls({"copy": lambda: target.copy_(source)}, device, 0.0, COPY_ROUNDS)["copy"]
    moved = 2 * source.nbytes
    return Timing(tuple(moved / seconds for seconds in timing.samples), timing.how)


def time_calls(
    calls: Mapping[str, Call],
    device: str,
    seconds: float,
    fewest: int = FEWEST_ROUNDS,
    end: float = float("inf"),
) -> dict[str, Timing]:
    """Time all calls in turns for about `seconds`, at least `fewest` and at most 100 rounds.

    Three rounds will do where they take ten times as long; behind `end` (of `time.monotonic`) no
    further round is begun, but for the first.
    """
    timers = {name: _timer(call, device) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.monotonic()
    for done in range(MOST_ROUNDS):
        now = time.monotonic()
        if (done >= fewest and now >= start + seconds) or (done and now >= end):
            break
        if seconds and done >= SLOW_ROUNDS and now >= start + PATIENCE * seconds:
            break
        for name, (timer, _) in timers.items():
            samples[name].append(timer())
    return {name: Timing(tuple(samples[name]), how) for name, (_, how) in timers.items()}


def _timer(call: Call, device: str) -> tuple[Callable[[], float], str]:
    """Warm a call up; return what takes one sample of it, and how."""
    warm = time.perf_counter() + WARM_SECONDS
    took = _wall(call, 0.0)
    if device != "cuda":
        # What a copy sets up at its first call would be timed otherwise.
        for _ in range(getattr(call, "copies", 1) - 1):
            if time.perf_counter() >= warm:
                break
            took = _wall(call, 0.0)
        settle = SETTLE_SECONDS if took < SETTLE_SECONDS else 0.0
        return lambda: _wall(call, settle), "calls"
    _on_side_stream(call)
    repeats = max(1, round(GRAPH_SECONDS / max(_events(call, 1), 1e-7)))
    # Copies take turns within a graph: too few calls would leave some of them out.
    repeats = max(repeats, getattr(call, "copies", 1))
    try:
        graph = _captured(call, repeats)
    except Exception:  # noqa: BLE001  # a library's compiler has errors of its own
        torch.cuda.synchronize()
        return lambda: _events(call, repeats), "events"
    graph.replay()
    return lambda: _events(graph.replay, 1) / repeats, "graph"


def _wall(call: Call, settle: float) -> float:
    settled = time.perf_counter() + settle
    while time.perf_counter() < settled:
        call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_side_stream(call: Call) -> None:
    """Call on another stream, as capturing wants it: libraries set themselves up at first calls."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _captured(call: Call, repeats: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def _events(call: Call, repeats: int) -> float:
    """Return seconds of one of `repeats` calls, between two events."""
    start, end = _event(), _event()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
