"""The buffered cache gives what transformers' own gives, copies seldom, and forks without harm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from methods.engine import TorchEngine
from methods.kv_cache import ROOM, BufferedCache, BufferedLayer
from tests.architectures import tiny, tiny_ids
from tests.methods.forks import check_fork, drawn


def states(tokens: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, 3, tokens, 4, generator=generator)
    return keys, torch.randn(batch, 3, tokens, 4, generator=generator)


def test_keys_and_values_are_those_of_the_dynamic_layer() -> None:
    plain, buffered = DynamicLayer(), BufferedLayer()
    for seed, tokens in enumerate([5, 1, 1, ROOM, 300, 1]):
        for found, expected in zip(
            buffered.update(*states(tokens, seed)), plain.update(*states(tokens, seed)), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert buffered.get_seq_length() == plain.get_seq_length()
        assert buffered.get_mask_sizes(3) == plain.get_mask_sizes(3)


def test_tokens_are_appended_in_place_and_room_doubles() -> None:
    layer = BufferedLayer()
    layer.update(*states(5))
    assert layer.key_buffer is not None
    places, capacities = {layer.key_buffer.data_ptr()}, {layer.key_buffer.shape[2]}
    for seed in range(400):
        layer.update(*states(1, seed))
        places.add(layer.key_buffer.data_ptr())
        capacities.add(layer.key_buffer.shape[2])
    room = 5 + ROOM
    assert capacities == {room, 2 * room, 4 * room, 8 * room}
    assert len(places) <= 4


def test_bytes_are_those_of_the_tokens_read() -> None:
    model = tiny("llama")
    engine = TorchEngine(model, "cpu", [])
    _, cache = engine.prefill(tiny_ids(2, 9))
    plain = DynamicCache(config=model.config)
    model(input_ids=tiny_ids(2, 9), past_key_values=plain)
    expected = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert isinstance(cache, BufferedCache)
    assert cache.nbytes == expected == 2 * 2 * 2 * 9 * 2 * 8 * 4


def test_a_fork_copies_when_it_writes_and_not_before() -> None:
    layer = BufferedLayer()
    layer.update(*states(6, batch=1))
    assert layer.key_buffer is not None
    place = layer.key_buffer.data_ptr()
    fork = layer.forked([0, 0, 0])
    assert fork.key_buffer is not None
    assert fork.key_buffer.data_ptr() == place
    before = layer.keys.clone() if layer.keys is not None else None
    fork.update(*states(2, 1, batch=3))
    assert fork.key_buffer.data_ptr() != place
    layer.update(*states(1, 2, batch=1))
    assert layer.key_buffer.data_ptr() == place
    assert before is not None
    assert layer.keys is not None
    assert fork.keys is not None
    torch.testing.assert_close(layer.keys[:, :, :6], before, rtol=0, atol=0)
    torch.testing.assert_close(fork.keys[:, :, :6], before.expand(3, -1, -1, -1), rtol=0, atol=0)
    torch.testing.assert_close(fork.keys[:, :, 6:], states(2, 1, batch=3)[0], rtol=0, atol=0)


@pytest.mark.parametrize("shorten", ["crop", "reset"])
def test_what_is_written_anew_does_not_reach_a_fork(shorten: str) -> None:
    layer = BufferedLayer()
    layer.update(*states(6, batch=1))
    fork = layer.forked([0])
    assert fork.keys is not None
    before = fork.keys.clone()
    if shorten == "crop":
        layer.crop(-4)
    else:
        layer.reset()
    layer.update(*states(4, 9, batch=1))
    assert layer.length == (6 if shorten == "crop" else 4)
    torch.testing.assert_close(fork.keys, before, rtol=0, atol=0)


def test_the_changes_that_transformers_makes() -> None:
    plain, buffered = DynamicLayer(), BufferedLayer()
    for layer in (plain, buffered):
        layer.update(*states(6))
        layer.crop(-2)
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([3, 1, 0]))
        layer.update(*states(2, 7, batch=3))
    assert buffered.keys is not None
    assert buffered.values is not None
    torch.testing.assert_close(buffered.keys, plain.keys, rtol=0, atol=0)
    torch.testing.assert_close(buffered.values, plain.values, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_prefill_goes_on_after_decoding(kind: str) -> None:
    engine = TorchEngine(tiny(kind), "cpu", [])
    ids = tiny_ids(2, 40)
    expected, _ = engine.prefill(ids)
    first, cache = engine.prefill(ids[:, :7])
    second, cache = engine.decode(ids[:, 7:8], cache)
    third, cache = engine.prefill(ids[:, 8:30], cache)
    steps = [first, second, third]
    for at in range(30, 40):
        logits, cache = engine.decode(ids[:, at : at + 1], cache)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)


def test_forks_of_a_batch_go_on_alone() -> None:
    engine = TorchEngine(tiny("llama"), "cpu", [])
    assert "fork" in engine.capabilities
    check_fork(engine, drawn(4, 320))
