"""Counters of energy that a machine has: NVML on a card, RAPL on a processor.

RAPL: `/sys/class/powercap/intel-rapl:N` (Linux, Documentation/power/powercap/powercap.rst), where
AMD's processors since Zen are found too. `energy_uj` counts microjoules and begins again after
`max_energy_range_uj`; since CVE-2020-8694 most systems let only root read it. NVML:
`nvmlDeviceGetTotalEnergyConsumption` counts millijoules (Volta and later); where a card lacks it,
`nvmlDeviceGetPowerUsage` (milliwatts) is sampled and summed over time. Nothing is ever estimated
from a data sheet or from the load.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, Protocol

import psutil

POWERCAP = Path("/sys/class/powercap")
PACKAGE = re.compile(r"package-\d+(-die-\d+)?")
"""Names of a whole processor; its parts (core, uncore, dram) and the platform (psys) are others."""

COUNTER_SECONDS = 5.0
"""A counter is read so often, to see each time that it begins again (minutes apart at most)."""
POWER_SECONDS = 0.05


class NoCounterError(Exception):
    """There is nothing here that counts energy; the sentence says why."""


class Meter(Protocol):
    """What counts the energy of one part of the machine.

    Attributes:
        name: as it stands in a protocol.
        covers: whose energy it counts, as a phrase.
        interval: seconds after which it must be asked again.
    """

    name: str
    covers: str
    interval: float

    def advance(self) -> float:
        """Return the joules since the last call; of the first call they mean nothing."""
        ...

    def close(self) -> None:
        """Give back what reading it takes."""
        ...


class PackageCounter:
    """The processor packages of the machine together.

    Args:
        powercap: folder with the `intel-rapl:N` folders of the system.

    Raises:
        NoCounterError: there is no package among them, or one of them cannot be read.
    """

    name = "rapl"
    covers = (
        "the processor packages (RAPL): all processes on them count, and on servers memory modules "
        "do not"
    )
    interval = COUNTER_SECONDS

    def __init__(self, powercap: Path = POWERCAP) -> None:
        try:
            zones = [
                zone
                for zone in sorted(powercap.glob("intel-rapl:*"))
                if PACKAGE.fullmatch((zone / "name").read_text().strip())
            ]
            self._ranges = {zone: _microjoules(zone / "max_energy_range_uj") for zone in zones}
            self._last = {zone: _microjoules(zone / "energy_uj") for zone in zones}
        except (OSError, ValueError) as error:
            raise NoCounterError(
                f"the processor's counters (RAPL) cannot be read: {error}"
            ) from error
        if not zones:
            raise NoCounterError(
                "the processor's counters (RAPL) are not here: no intel-rapl:N of a package in "
                f"{powercap}"
            )

    def advance(self) -> float:
        """Return the joules of all packages since the last call, at most one range of each."""
        total = 0
        for zone, last in self._last.items():
            now = _microjoules(zone / "energy_uj")
            total += now - last if now >= last else now - last + self._ranges[zone]
            self._last[zone] = now
        return total / 1e6

    def close(self) -> None:
        """Do nothing: the files are opened at each reading."""


class CardCounter:
    """One CUDA card, by its own counter of energy.

    Args:
        nvml: the initialized module `pynvml`.
        handle: of the card.

    Raises:
        nvml.NVMLError: the card has no such counter.
    """

    name = "nvml_counter"
    covers = "the whole card (NVML's counter): all processes on it count, the host does not"
    interval = COUNTER_SECONDS

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._last: int = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def advance(self) -> float:
        """Return the joules of the card since the last call."""
        now: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        joules = (now - self._last) / 1e3
        self._last = now
        return joules

    def close(self) -> None:
        """Shut NVML down."""
        self._nvml.nvmlShutdown()


class CardPower:
    """One CUDA card without a counter: its power, sampled and summed by the trapezoidal rule.

    Args:
        nvml: the initialized module `pynvml`.
        handle: of the card.

    Raises:
        nvml.NVMLError: the card does not tell its power.
    """

    name = "nvml_power"
    covers = (
        f"the whole card (NVML's power, sampled every {POWER_SECONDS:g} s and summed): all "
        "processes on it count, the host does not"
    )
    interval = POWER_SECONDS

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._last = self._sample()

    def _sample(self) -> tuple[float, float]:
        milliwatts: int = self._nvml.nvmlDeviceGetPowerUsage(self._handle)
        return time.perf_counter(), milliwatts / 1e3

    def advance(self) -> float:
        """Return the joules between the last sample and one taken now."""
        (before, earlier), (now, watts) = self._last, self._sample()
        self._last = now, watts
        return (now - before) * (earlier + watts) / 2

    def close(self) -> None:
        """Shut NVML down."""
        self._nvml.nvmlShutdown()


def card_meter(uuid: str, nvml: Any = None) -> Meter:
    """Return what counts the energy of the card with CUDA's `uuid`; `nvml` is module `pynvml`.

    Raises:
        NoCounterError: the module or the driver's library is missing, or the card says nothing.
    """
    if nvml is None:
        try:
            import pynvml  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError as error:
            raise NoCounterError("the card's counter (NVML) needs nvidia-ml-py") from error
        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NoCounterError(f"the card's counter (NVML) cannot be read: {error}") from error
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        try:
            return CardCounter(nvml, handle)
        except nvml.NVMLError:
            return CardPower(nvml, handle)
    except nvml.NVMLError as error:
        nvml.nvmlShutdown()
        raise NoCounterError(f"the card's counter (NVML) cannot be read: {error}") from error


def find_meters(device: str) -> tuple[list[Meter], list[str]]:
    """Return what counts energy for work on `device`, and a sentence for each that is not there.

    On a card the host's processor counts beside it, where it can be read.
    """
    meters: list[Meter] = []
    missing: list[str] = []
    if device == "cuda":
        import torch

        try:
            meters.append(card_meter(f"GPU-{torch.cuda.get_device_properties(0).uuid}"))
        except NoCounterError as error:
            missing.append(str(error))
    try:
        meters.append(PackageCounter())
    except NoCounterError as error:
        missing.append(str(error))
    return meters, missing


@dataclass(frozen=True)
class Reading:
    """What one stretch of time took.

    Attributes:
        joules: of each meter, by its name.
        seconds: how long it was.
        others_busy: processors that other processes kept busy, on average.
    """

    joules: dict[str, float]
    seconds: float
    others_busy: float


class Stretch:
    """Reads meters while its `with` block runs; `reading()` is for afterwards.

    A thread of its own asks each meter in time; what goes wrong there is raised at the end.
    """

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = meters
        self._joules = {meter.name: 0.0 for meter in meters}
        self._over = Event()

    def __enter__(self) -> Stretch:
        self._advance()
        self._joules = dict.fromkeys(self._joules, 0.0)
        self._busy = _busy_seconds()
        self._start = time.perf_counter()
        self._pool = ThreadPoolExecutor(1)
        self._watch: Future[None] = self._pool.submit(self._keep_asking)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._pool.shutdown()
        if error is None:
            self._watch.result()
            self._advance()
            self._seconds = time.perf_counter() - self._start
            self._busy = _busy_seconds() - self._busy

    def reading(self) -> Reading:
        """Return what the block took."""
        return Reading(self._joules, self._seconds, max(0.0, self._busy / self._seconds))

    def _keep_asking(self) -> None:
        while not self._over.wait(min(meter.interval for meter in self._meters)):
            self._advance()

    def _advance(self) -> None:
        for meter in self._meters:
            self._joules[meter.name] += meter.advance()


def _microjoules(path: Path) -> int:
    return int(path.read_text())


def _busy_seconds() -> float:
    """Return the processor seconds that all other processes of the machine have taken."""
    whole, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = whole.idle + getattr(whole, "iowait", 0.0)
    # Time of guests is part of `user`, and counted once.
    every = sum(whole) - getattr(whole, "guest", 0.0) - getattr(whole, "guest_nice", 0.0)
    return float(every - idle - own.user - own.system)
