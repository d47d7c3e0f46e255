"""Speed: which work is timed how often, and what is said about it. No duration is asserted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.hardware import Hardware
from harness.measures import speed as speed_module
from harness.measures.bandwidth import Bandwidth, measure_bandwidth, processor_cache_bytes
from harness.measures.speed import ImpossibleSpeedError, Speed
from harness.measures.timing import Burst, Point, run_burst
from kernels.errors import ConfigError
from tests.architectures import CONTEXT, tiny
from tests.harness.measures.surroundings import (
    BigramEngine,
    by_metric,
    drawn_ids,
    drawn_table,
    engine_of,
    make_context,
    publish_unquantized,
)

SMALL = Speed(prompt_lengths=[4], decode_tokens=3, repeats=5, warmup=1)


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module, "measure_bandwidth", lambda *_: Bandwidth(2e10, 3e10))


def context_of(tmp_path: Path) -> Any:
    context = make_context(tmp_path, drawn_ids(1, 8))
    publish_unquantized(context.artefact)
    return context


def test_samples_of_the_stated_number(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    values = by_metric(SMALL.run(engine_of(tiny("llama")), context))
    assert len(values["ttft_seconds"].samples) == 5
    assert len(values["tpot_seconds"].samples) == 5 * 3
    assert all(sample > 0 for sample in values["tpot_seconds"].samples)
    assert {value.protocol for value in values.values()} == {"prompt4_depth4_batch1"}
    rate = values["decode_tokens_per_second"].value
    assert rate == pytest.approx(1 / values["tpot_seconds"].value)
    assert values["prefill_tokens_per_second"].value == pytest.approx(
        4 / values["ttft_seconds"].value
    )
    assert "decode_speedup" not in values
    details = context.details["speed"]
    assert details["interleaved_with_baseline"] is False
    assert details["decoding"] == "transformers eager"
    assert details["baseline_decoding"] is None
    (point,) = details["points"]
    assert len(point["median_tpot_seconds_of_bursts"]) == 5
    read = point["weight_bytes_per_token"]
    assert values["achieved_bytes_per_second"].value == pytest.approx(read * rate)
    assert values["copy_bytes_per_second"].value == 2e10


def test_the_baseline_takes_turns_and_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(tmp_path)
    engine, baseline = BigramEngine(drawn_table(8)), BigramEngine(drawn_table(8))
    context.baseline = lambda: baseline
    order: list[str] = []

    def burst(one: Any, *_: Any) -> Burst:
        order.append("A" if one is engine else "B")
        return Burst(*((2.0, (0.5, 0.25)) if one is engine else (3.0, (1.0, 1.0))))

    monkeypatch.setattr(speed_module, "run_burst", burst)
    values = by_metric(SMALL.run(engine, context))
    assert "".join(order) == "AB" * 6
    assert values["prefill_speedup"].samples == (1.5,) * 5
    assert values["decode_speedup"].value == pytest.approx(1 / 0.375)
    assert values["decode_speedup"].stderr == pytest.approx(0.0)
    assert values["timing_spread"].value == pytest.approx(0.25 / 0.375)
    assert baseline.closed
    assert not engine.closed


def test_without_interleaving_no_baseline_is_loaded(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    context.baseline = lambda: pytest.fail("the baseline was loaded")
    alone = Speed(prompt_lengths=[4], decode_tokens=1, repeats=1, interleave_baseline=False)
    assert "decode_speedup" not in by_metric(alone.run(engine_of(tiny("llama")), context))


def test_a_burst_reads_the_prompt_then_decodes_at_its_depth() -> None:
    engine = BigramEngine(drawn_table(8))
    point = Point(prompt=4, depth=9, batch=2)
    ids = point.ids(8, seed=0)
    burst = run_burst(engine, point, ids, 3, "cpu")
    assert [tuple(read.shape) for read in engine.read] == [(2, 4), (2, 9), (2, 1), (2, 1), (2, 1)]
    assert engine.read[2].tolist() == engine.table[ids[:, 8]].argmax(-1)[:, None].tolist()
    assert len(burst.tokens) == 3


def test_every_combination_is_a_point() -> None:
    several = Speed(prompt_lengths=(4, 8), depths=(6,), batches=(1, 2))
    assert [point.protocol for point in several.points()] == [
        "prompt4_depth6_batch1",
        "prompt4_depth6_batch2",
        "prompt8_depth6_batch1",
        "prompt8_depth6_batch2",
    ]
    assert Speed(prompt_lengths=(4, 8)).points()[1] == Point(8, 8, 1)


def test_faster_than_the_memory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(tmp_path)
    measured: list[int] = []

    def slow_memory(*_: Any) -> Bandwidth:
        measured.append(1)
        return Bandwidth(1.0, 2.0)

    monkeypatch.setattr(speed_module, "measure_bandwidth", slow_memory)
    monkeypatch.setattr(speed_module, "processor_cache_bytes", lambda _: 0)
    with pytest.raises(ImpossibleSpeedError, match="the timing is wrong"):
        SMALL.run(engine_of(tiny("llama")), context)
    assert len(measured) == 4
    # Weights that the caches hold may be read faster than memory.
    monkeypatch.setattr(speed_module, "processor_cache_bytes", lambda _: 1 << 40)
    SMALL.run(engine_of(tiny("llama")), context)
    assert context.details["speed"]["points"][0]["weights_fit_into_caches"] is True


def test_a_batch_that_does_not_fit_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(tmp_path)
    per_token = 2 * 2 * 2 * 8 * 4
    monkeypatch.setattr(speed_module, "free_bytes", lambda _: 2 * 7 * per_token)
    several = Speed(prompt_lengths=[4], batches=[1, 64], decode_tokens=3, repeats=1)
    values = several.run(engine_of(tiny("llama")), context)
    assert {value.protocol for value in values} == {"prompt4_depth4_batch1"}
    (left_out,) = context.details["speed"]["left_out"]
    assert left_out.startswith("prompt4_depth4_batch64: its cache would take")


def test_simulated_weights_have_no_speed(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    assert SMALL.run(BigramEngine(drawn_table(8), execution="simulated"), context) == []


def test_more_tokens_than_the_model_reads(tmp_path: Path) -> None:
    deep = Speed(prompt_lengths=[CONTEXT], decode_tokens=1)
    with pytest.raises(ConfigError, match=r"needs a context of 65 tokens, but the model has 64"):
        deep.run(engine_of(tiny("llama")), context_of(tmp_path / "alone"))
    context = context_of(tmp_path / "beside")
    both = Speed(prompt_lengths=[4, CONTEXT], decode_tokens=1, repeats=1)
    values = both.run(engine_of(tiny("llama")), context)
    assert {value.protocol for value in values} == {"prompt4_depth4_batch1"}
    (left_out,) = context.details["speed"]["left_out"]
    assert left_out.startswith("prompt64_depth64_batch1: with 1 decoded tokens it needs")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt_lengths": []}, r"prompt_lengths is \[\]"),
        ({"batches": [0]}, r"batches is \[0\]"),
        ({"depths": [0]}, r"depths is \[0\]"),
        ({"repeats": 0}, "repeats is 0"),
        ({"decode_tokens": 0}, "decode_tokens is 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Speed(**options)


def test_bandwidth_of_small_buffers_is_positive() -> None:
    found = measure_bandwidth("cpu", free_bytes=4 << 20)
    assert found.copy > 0
    assert found.read > 0
    assert found.ceiling == max(found.copy, found.read)
    assert processor_cache_bytes("cpu") >= 0


def test_a_memory_limit_bounds_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def record(device: str, free: int) -> Bandwidth:
        seen.append(free)
        return Bandwidth(1e12, 1e12)

    monkeypatch.setattr(speed_module, "measure_bandwidth", record)
    context = make_context(Path("/nonexistent"), drawn_ids(1, 8))
    context.hardware = Hardware("cpu", "cpu", memory_limit_bytes=1)
    empty = Speed(prompt_lengths=[4], decode_tokens=1, repeats=1)
    assert empty.run(engine_of(tiny("llama")), context) == []
    assert seen == [0]
