"""Bytes of keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.hardware import Hardware
from harness.measures.memory import Memory, free_bytes
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
    (value,) = Memory(depth=40).run(engine_of(tiny("llama")), context)
    layers, kv_heads, head_dim = 2, 2, 8
    assert value.value == 2 * layers * kv_heads * head_dim * 40 * 4
    assert (value.metric, value.protocol) == ("kv_cache_bytes", "depth40_batch1")


def test_what_cannot_be_seen_or_means_nothing_is_left_out(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    assert Memory().run(BigramEngine(drawn_table(8)), context) == []
    assert Memory().run(BigramEngine(drawn_table(8), execution="simulated"), context) == []


def test_a_depth_the_model_does_not_have(tmp_path: Path) -> None:
    context = make_context(tmp_path, drawn_ids(1, 8))
    with pytest.raises(ConfigError, match=f"reads at most {CONTEXT} tokens"):
        Memory(depth=CONTEXT + 1).run(engine_of(tiny("llama")), context)
    with pytest.raises(ConfigError, match="depth is 0"):
        Memory(depth=0)


def test_free_memory_heeds_the_limit() -> None:
    whole = free_bytes(Hardware("cpu", "cpu"))
    limited = free_bytes(Hardware("cpu", "cpu", memory_limit_bytes=10))
    assert limited == 0 < whole
