"""Energy, on a made-up machine: a clock, counters in a folder and a card that an engine moves."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.context import Context
from harness.measures import energy as energy_module
from harness.measures import energy_counters
from harness.measures.energy import Energy
from harness.measures.energy_counters import (
    CardCounter,
    CardPower,
    Meter,
    NoCounterError,
    PackageCounter,
    Stretch,
    card_meter,
    find_meters,
)
from kernels.errors import ConfigError
from tests.harness.measures.surroundings import (
    BigramEngine,
    by_metric,
    drawn_ids,
    drawn_table,
    make_context,
)

RANGE = 262_143_328_850
"""`max_energy_range_uj` of a real package."""
IDLE_WATTS = 10.0
PROMPT_JOULES, PROMPT_SECONDS = 8.0, 0.5
TOKEN_JOULES, TOKEN_SECONDS = 3.0, 0.125
PATIENCE_SECONDS = 60.0

SMALL = Energy(prompt_length=4, decode_tokens=5, seconds=3.0, idle_seconds=2.0, repeats=3)


def write_zone(folder: Path, name: str, microjoules: int, most: int = RANGE) -> Path:
    folder.mkdir(parents=True)
    for file, content in (
        ("name", name),
        ("energy_uj", microjoules),
        ("max_energy_range_uj", most),
        ("enabled", 0),
    ):
        (folder / file).write_text(f"{content}\n")
    return folder


class Machine:
    """Two packages, one of them about to begin again, a clock, and folders that do not count."""

    def __init__(self, root: Path) -> None:
        self.root, self.now = root, 100.0
        self.packages = [
            write_zone(root / "intel-rapl:0", "package-0", RANGE - 30_000_000),
            write_zone(root / "intel-rapl:1", "package-1-die-0", 5),
        ]
        for folder, name in (
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "dram"),
            ("intel-rapl:2", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
        ):
            write_zone(root / folder, name, 7)
        write_zone(root / "dtpm", "dtpm", 7)

    def spend(self, seconds: float, joules: float = 0.0) -> None:
        self.now += seconds
        each = round((joules + IDLE_WATTS * seconds) * 1e6 / len(self.packages))
        for package in self.packages:
            file = package / "energy_uj"
            file.write_text(f"{(int(file.read_text()) + each) % RANGE}\n")

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.spend(seconds)


class PoweredEngine(BigramEngine):
    """Takes a fixed time and energy for each prompt and each token."""

    def __init__(self, machine: Machine, **options: Any) -> None:
        super().__init__(drawn_table(8), **options)
        self.machine = machine

    def prefill(
        self, input_ids: Tensor, cache: Any = None, last: int | None = None
    ) -> tuple[Tensor, Any]:
        self.machine.spend(PROMPT_SECONDS, PROMPT_JOULES)
        return super().prefill(input_ids, cache, last)

    def decode(self, token: Tensor, cache: Any) -> tuple[Tensor, Any]:
        self.machine.spend(TOKEN_SECONDS, TOKEN_JOULES)
        return self.table[token], cache


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path / "powercap")
    monkeypatch.setattr(energy_module, "time", made)
    monkeypatch.setattr(energy_counters, "time", made)
    monkeypatch.setattr(energy_counters, "_busy_seconds", lambda: 0.0)
    meters: list[Meter] = [PackageCounter(made.root)]
    monkeypatch.setattr(energy_module, "find_meters", lambda _: (meters, []))
    return made


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return make_context(tmp_path, drawn_ids(1, 8))


def test_joules_a_token_are_those_that_were_spent(machine: Machine, context: Context) -> None:
    values = by_metric(SMALL.run(PoweredEngine(machine), context))
    found = {metric: value.value for metric, value in values.items()}
    assert found == pytest.approx(
        {
            "idle_watts": IDLE_WATTS,
            "prefill_joules_per_token": (PROMPT_JOULES + IDLE_WATTS * PROMPT_SECONDS) / 4,
            "prefill_above_idle_joules_per_token": PROMPT_JOULES / 4,
            "decode_joules_per_token": TOKEN_JOULES + IDLE_WATTS * TOKEN_SECONDS,
            "decode_above_idle_joules_per_token": TOKEN_JOULES,
        },
        rel=1e-5,
    )
    assert {value.protocol for value in values.values()} == {"rapl_prompt4_new5_batch1"}
    assert {value.unit for value in values.values()} == {"W", "J/token"}
    assert all(len(value.samples) == 3 for value in values.values())
    details = context.details["energy"]
    assert "all processes on them count" in details["covers"]["rapl"]
    assert details["idle"].startswith("2 s with the model loaded")
    for one in details["rounds"]:
        assert one["idle"]["seconds"] == pytest.approx(2.0)
        # Bursts go on for at least their length: 6 prompts of 0.5 s, 3 with their tokens.
        assert (one["prompt_count"], one["writing_count"]) == (6, 3)
    assert context.details["notes"] == []


def test_every_sequence_of_a_batch_has_its_tokens(machine: Machine, context: Context) -> None:
    engine = PoweredEngine(machine)
    two = Energy(prompt_length=4, batch=2, decode_tokens=5, repeats=1)
    values = by_metric(two.run(engine, context))
    assert values["decode_above_idle_joules_per_token"].value == pytest.approx(TOKEN_JOULES / 2)
    assert values["idle_watts"].protocol == "rapl_prompt4_new5_batch2"
    assert {tuple(read.shape) for read in engine.read} == {(2, 4)}


def test_a_machine_that_says_nothing_costs_nothing(
    tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackageCounter.__init__, "__defaults__", (tmp_path / "none",))
    engine = BigramEngine(drawn_table(8), context_length=2)
    assert SMALL.run(engine, context) == []
    assert engine.read == []
    (note,) = context.details["notes"]
    assert note == (
        "energy not measured: the processor's counters (RAPL) are not here: no intel-rapl:N of a "
        f"package in {tmp_path / 'none'}"
    )


def test_a_counter_that_stands_still_gives_no_value(
    machine: Machine, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "packages", [])
    monkeypatch.setattr(
        machine,
        "spend",
        lambda seconds, joules=0.0: machine.__dict__.update(now=machine.now + seconds),
    )
    assert SMALL.run(PoweredEngine(machine), context) == []
    assert context.details["notes"] == ["energy not measured: the counter rapl stood still"]


def test_what_comes_out_below_zero_is_no_figure(
    machine: Machine, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another process works while the machine should be idle, and not afterwards.
    monkeypatch.setattr(machine, "sleep", lambda seconds: machine.spend(seconds, 1000 * seconds))
    values = by_metric(SMALL.run(PoweredEngine(machine), context))
    assert set(values) == {"idle_watts", "prefill_joules_per_token", "decode_joules_per_token"}
    assert [note.split(" not measured")[0] for note in context.details["notes"]] == [
        "prefill_above_idle_joules_per_token of rapl",
        "decode_above_idle_joules_per_token of rapl",
    ]


def test_the_load_of_others_is_said(
    machine: Machine, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy_counters, "_busy_seconds", lambda: 1.5 * machine.now)
    SMALL.run(PoweredEngine(machine), context)
    assert context.details["notes"] == [
        "energy: other processes kept 1.5 processors busy meanwhile"
    ]
    assert context.details["energy"]["rounds"][0]["idle"]["others_busy"] == pytest.approx(1.5)


def test_other_processes_of_this_machine_have_taken_time() -> None:
    assert energy_counters._busy_seconds() >= 0


def test_simulated_weights_have_no_energy(machine: Machine, context: Context) -> None:
    engine = PoweredEngine(machine, execution="simulated")
    assert SMALL.run(engine, context) == []
    assert engine.read == []


def test_more_tokens_than_the_model_reads(machine: Machine, context: Context) -> None:
    with pytest.raises(ConfigError, match=r"needs a context of 9 tokens .* the model has 8"):
        SMALL.run(PoweredEngine(machine, context_length=8), context)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt_length": 0}, "prompt_length is 0; it must be 1 or more"),
        ({"repeats": 0}, "repeats is 0"),
        ({"seconds": 0}, "seconds is 0; it must be above 0"),
        ({"idle_seconds": -1}, "idle_seconds is -1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Energy(**options)


def test_packages_are_summed_and_may_begin_again(tmp_path: Path) -> None:
    near_end = write_zone(tmp_path / "intel-rapl:0", "package-0", RANGE - 1_000_000)
    other = write_zone(tmp_path / "intel-rapl:1", "package-1", 4_000_000, most=65_532_610_987)
    counter = PackageCounter(tmp_path)
    assert counter.advance() == 0.0
    (near_end / "energy_uj").write_text("2500000\n")
    (other / "energy_uj").write_text("4250000\n")
    assert counter.advance() == pytest.approx(1.0 + 2.5 + 0.25)
    (other / "energy_uj").write_text("250000\n")
    assert counter.advance() == pytest.approx(65_532.610987 - 4.0)
    counter.close()


@pytest.mark.parametrize("unreadable", ["energy_uj", "max_energy_range_uj"])
def test_half_of_the_packages_is_not_the_machine(tmp_path: Path, unreadable: str) -> None:
    write_zone(tmp_path / "intel-rapl:0", "package-0", 1)
    file = write_zone(tmp_path / "intel-rapl:1", "package-1", 1) / unreadable
    file.unlink()
    # What opening it says: a folder cannot be read by root either.
    file.mkdir()
    with pytest.raises(NoCounterError, match=rf"RAPL.*intel-rapl:1/{unreadable}"):
        PackageCounter(tmp_path)


class FakeNvml:
    """The part of `pynvml` that is asked; a missing reading raises as the library does."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules: list[int] | None, milliwatts: int | None) -> None:
        self.millijoules, self.milliwatts = millijoules, milliwatts
        self.open = 0
        self.asked: list[str] = []
        self.fifth = Event()
        self.samples = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle"
        if self.millijoules is None:
            raise self.NVMLError("Not Supported")
        return self.millijoules.pop(0)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle"
        if self.milliwatts is None:
            raise self.NVMLError("Not Supported")
        self.samples += 1
        if self.samples == 5:
            self.fifth.set()
        return self.milliwatts


def test_a_card_by_its_counter() -> None:
    nvml = FakeNvml([5_000_000, 5_000_500, 5_002_000], None)
    meter = card_meter("GPU-1", nvml)
    assert isinstance(meter, CardCounter)
    assert [meter.advance(), meter.advance()] == [0.5, 1.5]
    assert nvml.asked == ["GPU-1"]
    meter.close()
    assert nvml.open == 0


def test_a_card_without_a_counter_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(None, 300_000)
    meter = card_meter("GPU-1", nvml)
    assert isinstance(meter, CardPower)
    monkeypatch.setattr(CardPower, "interval", 0.001)
    with Stretch([meter]) as stretch:
        assert nvml.fifth.wait(PATIENCE_SECONDS)
    assert stretch.reading().joules["nvml_power"] > 0
    meter.close()
    assert nvml.open == 0


def test_power_is_summed_by_the_trapezoidal_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        readings = iter([0.0, 0.5, 2.5])

        def perf_counter(self) -> float:
            return next(self.readings)

    nvml = FakeNvml(None, 100_000)
    monkeypatch.setattr(energy_counters, "time", Clock())
    meter = CardPower(nvml, "handle")
    nvml.milliwatts = 300_000
    assert meter.advance() == pytest.approx(0.5 * 200)
    assert meter.advance() == pytest.approx(2.0 * 300)


def test_a_card_that_says_nothing() -> None:
    nvml = FakeNvml(None, None)
    with pytest.raises(NoCounterError, match=r"NVML\) cannot be read: Not Supported"):
        card_meter("GPU-1", nvml)
    assert nvml.open == 0


def test_what_goes_wrong_while_a_meter_is_asked_comes_out() -> None:
    class Broken:
        name, covers, interval = "broken", "nothing", 0.001
        calls = 0
        third = Event()

        def advance(self) -> float:
            self.calls += 1
            if self.calls == 3:
                self.third.set()
                raise OSError("the counter is gone")
            return 0.0

        def close(self) -> None: ...

    broken = Broken()
    with pytest.raises(OSError, match="the counter is gone"), Stretch([broken]):
        assert broken.third.wait(PATIENCE_SECONDS)


def test_on_a_card_both_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "d0e1"

    def no_card(uuid: str) -> Meter:
        assert uuid == "GPU-d0e1"
        raise NoCounterError("the card's counter (NVML): Driver Not Loaded")

    write_zone(tmp_path / "intel-rapl:0", "package-0", 1)
    monkeypatch.setattr(PackageCounter.__init__, "__defaults__", (tmp_path,))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    monkeypatch.setattr(energy_counters, "card_meter", no_card)
    meters, missing = find_meters("cuda")
    assert [meter.name for meter in meters] == ["rapl"]
    assert missing == ["the card's counter (NVML): Driver Not Loaded"]
