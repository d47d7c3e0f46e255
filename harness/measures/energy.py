"""Energy of reading a prompt and of writing tokens, where the machine counts it.

Each round measures the idle machine (model loaded, nothing running), then bursts of prompts, then
bursts of prompts with tokens written after each. Bursts last seconds, because NVML's counter moves
every 20 to 100 ms only. A written token's joules are those of the second burst less those of its
prompts, as the first burst has measured them. Both stand as counted and above idle, which takes
the idle machine's power off for as long as the burst lasted. Where nothing counts energy there is
no value, and a note says why.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import ClassVar

from harness.context import Context
from harness.measures.energy_counters import Meter, Reading, Stretch, find_meters
from harness.measures.execution import is_simulated
from harness.measures.timing import Point, run_burst
from harness.record import Value
from kernels.errors import ConfigError
from methods.base import Engine

NOTABLE_LOAD = 0.5
"""Processors kept busy by others from which on a report says so."""


@dataclass(frozen=True)
class Round:
    """The idle machine and the two bursts after it; counts are the prompts of each burst."""

    idle: Reading
    prompts: Reading
    prompt_count: int
    writing: Reading
    writing_count: int

    @property
    def parts(self) -> tuple[Reading, Reading, Reading]:
        """All three, in order."""
        return self.idle, self.prompts, self.writing


@dataclass(frozen=True)
class Energy:
    """Joules a token of reading prompts and of writing.

    Attributes:
        prompt_length: tokens of each prompt.
        batch: sequences at once.
        decode_tokens: tokens written after each prompt.
        seconds: least length of a burst.
        idle_seconds: how long the idle machine is measured before the bursts of a round.
        repeats: rounds; the median counts.
    """

    prompt_length: int = 128
    batch: int = 1
    decode_tokens: int = 128
    seconds: float = 3.0
    idle_seconds: float = 2.0
    repeats: int = 3

    quality: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "cache"})

    def __post_init__(self) -> None:
        for name in ("prompt_length", "batch", "decode_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"energy's {name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("seconds", "idle_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"energy's {name} is {getattr(self, name)}; it must be above 0")

    def run(self, engine: Engine, context: Context) -> list[Value]:
        """Return joules a token and idle watts of each counter; nothing where none is here.

        Raises:
            ConfigError: the model reads fewer tokens than a prompt and what is written after it.
        """
        if is_simulated(engine):
            return []
        meters, missing = find_meters(context.hardware.device)
        context.details["notes"] += [f"energy not measured: {reason}" for reason in missing]
        try:
            return self._measure(engine, meters, context) if meters else []
        finally:
            for meter in meters:
                meter.close()

    def _measure(self, engine: Engine, meters: list[Meter], context: Context) -> list[Value]:
        wanted = self.prompt_length + self.decode_tokens
        if wanted > engine.context_length:
            raise ConfigError(
                f"energy needs a context of {wanted} tokens (prompt_length and decode_tokens), but "
                f"the model has {engine.context_length}"
            )
        point = Point(self.prompt_length, self.prompt_length, self.batch)
        ids = point.ids(engine.vocab_size, context.seed)
        device = context.hardware.device

        def read() -> None:
            run_burst(engine, point, ids, 0, device)

        def write() -> None:
            run_burst(engine, point, ids, self.decode_tokens, device)

        load = os.getloadavg()[0]
        write()
        rounds = [self._round(meters, read, write) for _ in range(self.repeats)]
        context.details["energy"] = {
            "covers": {meter.name: meter.covers for meter in meters},
            "idle": f"{self.idle_seconds:g} s with the model loaded, before each round",
            "load_average": [load, os.getloadavg()[0]],
            "rounds": [asdict(one) for one in rounds],
        }
        notes = context.details["notes"]
        others = max(part.others_busy for one in rounds for part in one.parts)
        if others >= NOTABLE_LOAD:
            notes.append(f"energy: other processes kept {others:.1f} processors busy meanwhile")
        values: list[Value] = []
        for meter in meters:
            if not all(part.joules[meter.name] > 0 for one in rounds for part in one.parts):
                notes.append(f"energy not measured: the counter {meter.name} stood still")
                continue
            for value in self._values(meter.name, rounds):
                if value.value > 0:
                    values.append(value)
                    continue
                notes.append(
                    f"{value.metric} of {meter.name} not measured: it came out as "
                    f"{value.value:.2g} J, from bursts too short or beside other work"
                )
        return values

    def _round(
        self, meters: list[Meter], read: Callable[[], None], write: Callable[[], None]
    ) -> Round:
        with Stretch(meters) as idle:
            time.sleep(self.idle_seconds)
        prompts, prompt_count = self._burst(meters, read)
        writing, writing_count = self._burst(meters, write)
        return Round(idle.reading(), prompts, prompt_count, writing, writing_count)

    def _burst(self, meters: list[Meter], work: Callable[[], None]) -> tuple[Reading, int]:
        """Return what doing `work` again and again took, and how often it was done."""
        count = 0
        with Stretch(meters) as stretch:
            start = time.perf_counter()
            while not count or time.perf_counter() - start < self.seconds:
                work()
                count += 1
        return stretch.reading(), count

    def _values(self, name: str, rounds: list[Round]) -> list[Value]:
        protocol = f"{name}_prompt{self.prompt_length}_new{self.decode_tokens}_batch{self.batch}"
        found: dict[str, list[float]] = {}
        for one in rounds:
            idle = one.idle.joules[name] / one.idle.seconds
            found.setdefault("idle_watts", []).append(idle)
            for watts, kind in ((0.0, ""), (idle, "_above_idle")):
                prompt = _above(one.prompts, name, watts) / one.prompt_count
                whole = _above(one.writing, name, watts) / one.writing_count
                tokens = {
                    "prefill": prompt / (self.batch * self.prompt_length),
                    "decode": (whole - prompt) / (self.batch * self.decode_tokens),
                }
                for phase, joules in tokens.items():
                    metric = f"{phase}{kind}_joules_per_token"
                    found.setdefault(metric, []).append(joules)
        return [_value(metric, protocol, samples) for metric, samples in found.items()]


def _above(reading: Reading, name: str, watts: float) -> float:
    """Return the joules of `reading` above those that `watts` give in its time."""
    return reading.joules[name] - watts * reading.seconds


def _value(metric: str, protocol: str, samples: list[float]) -> Value:
    idle = metric == "idle_watts"
    unit, higher = ("W", None) if idle else ("J/token", False)
    return Value("energy", metric, protocol, median(samples), unit, higher, None, tuple(samples))
