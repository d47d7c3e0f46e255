"""What the machine's memory gives, measured in the run that is judged by it.

`copy_bytes_per_second` follows STREAM's Copy (McCalpin): a copy of n bytes counts 2 n, read and
written; the extra read that a cache makes before it writes a line is not counted. Decoding only
reads, so a plain read of the same bytes is timed too: the ceiling that a decode rate is held
against is the faster of the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from os import sched_getaffinity
from pathlib import Path

import torch

SMALLEST_BUFFER_BYTES = 128 << 20
LARGEST_BUFFER_BYTES = 512 << 20
BUFFER_OVER_CACHES = 4
REPEATS = 4
ROW = 4096


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second, the best of several attempts.

    Attributes:
        copy: STREAM's Copy, bytes read and bytes written both counted.
        read: a matrix-vector product over the same buffer, bytes read counted.
    """

    copy: float
    read: float

    @property
    def ceiling(self) -> float:
        """The faster of the two."""
        return max(self.copy, self.read)


def synchronize(device: str) -> None:
    """Wait for a CUDA device's queue to end; a CPU has none."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure_bandwidth(device: str, free_bytes: int) -> Bandwidth:
    """Measure copy and read over two float32 buffers far beyond the caches (not kept afterwards).

    Together they take at most half of `free_bytes`.
    """
    wanted = BUFFER_OVER_CACHES * processor_cache_bytes(device)
    size = min(LARGEST_BUFFER_BYTES, max(SMALLEST_BUFFER_BYTES, wanted), free_bytes // 4)
    source = torch.ones(max(1, size // (4 * ROW)), ROW, device=device)
    target = torch.empty_like(source)
    vector = torch.ones(ROW, device=device)
    copying = _best_seconds(lambda: target.copy_(source), device)
    reading = _best_seconds(lambda: source @ vector, device)
    held = source.numel() * source.element_size()
    return Bandwidth(2 * held / copying, held / reading)


def _best_seconds(work: Callable[[], object], device: str) -> float:
    """Return the shortest of several timings; the first one, which touches the memory, is out."""
    work()
    seconds = []
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@cache
def processor_cache_bytes(device: str) -> int:
    """Return the bytes of all caches of the second level and beyond that this process can use.

    0 where the system does not say.
    """
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    found: dict[tuple[str, str], int] = {}
    for cpu in sched_getaffinity(0):
        for entry in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                level, shared, size = (
                    (entry / name).read_text().strip()
                    for name in ("level", "shared_cpu_list", "size")
                )
            except OSError:
                continue
            if int(level) >= 2 and size.endswith("K"):
                found[level, shared] = int(size[:-1]) << 10
    return sum(found.values())
