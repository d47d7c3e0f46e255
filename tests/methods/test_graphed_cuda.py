"""Recorded decoding on a card: what `test_graphed` cannot see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from methods.engine import TorchEngine
from methods.fused import fuse
from methods.graphed import SMALLEST_BUFFER, GraphedDecode, StaticStep, fast_decode, record
from methods.kv_cache import BufferedCache
from tests.methods.machine import Machine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")

DEVICE = "cuda"
VOCABULARY = 512
MACHINE = Machine(device=DEVICE, compute_dtype="bfloat16")


@pytest.fixture(scope="module")
def model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    torch.manual_seed(1)
    made = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16).eval().requires_grad_(False)
    fuse(made)
    return made


def ids_of(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(VOCABULARY, (rows, length), generator=generator).to(DEVICE)


def cache_of(model: Any, ids: Tensor) -> BufferedCache:
    _, cache = TorchEngine(model, DEVICE, []).prefill(ids)
    assert isinstance(cache, BufferedCache)
    return cache


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_a_replay_is_what_was_recorded(model: Any, rows: int) -> None:
    ids = ids_of(rows, 40)
    replayed, eager = GraphedDecode(model, record), GraphedDecode(model, lambda step: step)
    caches = [cache_of(model, ids[:, :10]) for _ in range(2)]
    for at in range(10, 40):
        token = ids[:, at : at + 1]
        found, expected = replayed.decode(token, caches[0]), eager.decode(token, caches[1])
        assert found is not None
        assert expected is not None
        # Other streams may give the same matrix to another kernel of cuBLAS.
        assert relative(found, expected) < 0.01
    assert relative(caches[0].layers[1].keys, caches[1].layers[1].keys) < 0.01


@torch.no_grad()
def test_the_engine_decodes_by_graphs_and_grows(model: Any) -> None:
    fast, name = fast_decode(model, MACHINE)
    assert fast is not None
    assert name == "one CUDA graph a token"
    engine, plain = TorchEngine(model, DEVICE, [], fast=fast), TorchEngine(model, DEVICE, [])
    start = SMALLEST_BUFFER - 4
    ids = ids_of(2, start + 8)
    (_, one), (_, other) = engine.prefill(ids[:, :start]), plain.prefill(ids[:, :start])
    for at in range(start, start + 8):
        token = ids[:, at : at + 1]
        found, expected = engine.decode(token, one)[0], plain.decode(token, other)[0]
        assert relative(found, expected) < 0.05
    assert one.layers[0].key_buffer.shape[2] == 2 * SMALLEST_BUFFER


@torch.no_grad()
def test_a_hundred_tokens_take_no_more_memory(model: Any) -> None:
    fast = GraphedDecode(model)
    ids = ids_of(1, 130)
    cache = cache_of(model, ids[:, :10])
    for at in range(10, 20):
        fast.decode(ids[:, at : at + 1], cache)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for at in range(20, 120):
        fast.decode(ids[:, at : at + 1], cache)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@torch.no_grad()
def test_replays_go_to_the_current_stream(model: Any) -> None:
    ids = ids_of(1, 12)
    step = StaticStep(model, cache_of(model, ids[:, :10]).layers, SMALLEST_BUFFER)
    for layer in step.layers:
        layer.keys.zero_()
        layer.values.zero_()
    replay = record(step)
    step.token.copy_(ids[:, 10:11])
    expected = replay().clone()
    torch.cuda.synchronize()
    step.token.copy_(ids[:, 11:12])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The replay must wait for this stream, and for no other.
        torch.cuda._sleep(20_000_000)
        step.token.copy_(ids[:, 10:11])
        found = replay().clone()
    stream.synchronize()
    assert relative(found, expected) < 1e-3


@torch.no_grad()
def test_a_model_that_waits_for_the_card_is_refused_and_the_card_still_works(model: Any) -> None:
    forward = model.model.norm.forward

    def waiting(x: Tensor) -> Tensor:
        return forward(x) * float(x.abs().amax() >= 0)

    model.model.norm.forward = waiting
    try:
        fast, reason = fast_decode(model, MACHINE)
    finally:
        del model.model.norm.forward
    assert fast is None
    assert "waits for values that are on the device" in reason
    assert float(torch.ones(3, device=DEVICE).sum()) == 3
    assert fast_decode(model, MACHINE)[0] is not None
