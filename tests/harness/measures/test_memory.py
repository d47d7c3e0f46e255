"""Peak memory, and bytes of keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.hardware import Hardware
from harness.measures.memory import Memory, free_bytes
from harness.memory import reset_peak
from kernels.errors import ConfigError
from tests.architectures import CONTEXT, tiny
from tests.harness.measures.surroundings import (
    BigramEngine,
    drawn_ids,
    drawn_table,
    engine_of,
    make_context,
)


def test_keys_and_values_of_every_layer(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    _, value = Memory(depth=40).run(engine_of(tiny("llama")), context)
    layers, kv_heads, head_dim = 2, 2, 8
    assert value.value == 2 * layers * kv_heads * head_dim * 40 * 4
    assert (value.metric, value.protocol) == ("kv_cache_bytes", "depth40_batch1")


def test_the_peak_is_what_running_added_to_the_process(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    held = []

    class HungryEngine(BigramEngine):
        def decode(self, token: Any, cache: Any) -> Any:
            held.append(torch.ones(50_000_000, dtype=torch.uint8))
            return super().decode(token, cache)

    context.resident_at_start = reset_peak()
    (value,) = Memory(depth=4).run(HungryEngine(drawn_table(8)), context)
    assert (value.metric, value.protocol) == ("peak_memory_bytes", "process_peak_depth4")
    assert 50e6 <= value.value < 80e6


def test_what_cannot_be_seen_or_means_nothing_is_left_out(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    (value,) = Memory().run(BigramEngine(drawn_table(8)), context)
    assert value.metric == "peak_memory_bytes"
    assert Memory().run(BigramEngine(drawn_table(8), execution="simulated"), context) == []


def test_a_depth_the_model_does_not_have(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    with pytest.raises(ConfigError, match=f"reads at most {CONTEXT} tokens"):
        Memory(depth=CONTEXT).run(engine_of(tiny("llama")), context)
    with pytest.raises(ConfigError, match="depth is 0"):
        Memory(depth=0)


def test_free_memory_heeds_the_limit() -> None:
    whole = free_bytes(Hardware("cpu", "cpu"))
    limited = free_bytes(Hardware("cpu", "cpu", memory_limit_bytes=10))
    assert limited == 0 < whole
