"""Decoding from fixed addresses: everything but the recording itself, which needs a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache
from transformers.integrations import sdpa_attention

from methods import graphed
from methods.engine import TorchEngine
from methods.fused import fuse
from methods.graphed import GraphedDecode, Replay, checked, fast_decode
from methods.kv_cache import BufferedCache
from tests.architectures import CONFIGS, CONTEXT, VOCABULARY, tiny
from tests.methods.forks import check_fork, drawn
from tests.methods.machine import Machine

KINDS = ["llama", "qwen2", "gpt2", "opt", "gpt_neox"]


class Recorder:
    """Stands for `graphed.record`: a replay runs the step again. Counts what was recorded."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, step: Replay) -> Replay:
        self.count += 1
        output = step()

        def replay() -> Tensor:
            # As a graph does, into the tensor that the recording left.
            return output.copy_(step())

        return replay


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "SMALLEST_BUFFER", 16)


def engine_of(model: Any) -> tuple[TorchEngine, Recorder]:
    recorder = Recorder()
    return TorchEngine(model, "cpu", [], fast=GraphedDecode(model, recorder)), recorder


@torch.no_grad()
def plainly(model: Any, ids: Tensor) -> Tensor:
    """Return the logits [B, T, V] of the model itself, without any cache."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def decoded(engine: TorchEngine, ids: Tensor, cache: Any) -> Tensor:
    steps = [engine.decode(ids[:, at : at + 1], cache)[0] for at in range(ids.shape[1])]
    return torch.cat(steps, dim=1)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def ids_of(rows: int, length: int, seed: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_goes_on_as_the_model_does(kind: str, rows: int) -> None:
    model, ids = tiny(kind), ids_of(rows, 60)
    fuse(model)
    engine, recorder = engine_of(model)
    expected = plainly(model, ids)
    _, cache = engine.prefill(ids[:, :10])
    # Buffers of 16, then 32.
    same(decoded(engine, ids[:, 10:25], cache), expected[:, 10:25])
    assert recorder.count == 2
    place = cache.layers[0].key_buffer.data_ptr()
    same(engine.prefill(ids[:, 25:30], cache)[0], expected[:, 25:30])
    same(decoded(engine, ids[:, 30:32], cache), expected[:, 30:32])
    # Prefill wrote where decoding reads.
    assert cache.layers[0].key_buffer.data_ptr() == place
    assert recorder.count == 2
    same(engine.prefill(ids[:, 32:40], cache)[0], expected[:, 32:40])
    same(decoded(engine, ids[:, 40:], cache), expected[:, 40:])
    assert recorder.count == 3
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_are_the_callers_own(kind: str) -> None:
    engine, _ = engine_of(tiny(kind))
    ids = ids_of(1, 8)
    _, cache = engine.prefill(ids[:, :4])
    first, _ = engine.decode(ids[:, 4:5], cache)
    kept = first.clone()
    engine.decode(ids[:, 5:6], cache)
    assert first.dtype == torch.float32
    assert first.shape == (1, 1, VOCABULARY)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_cache_goes_on_in_several_ways(kind: str) -> None:
    model = tiny(kind)
    check_fork(engine_of(model)[0], drawn(4, VOCABULARY))


def test_forks_of_a_decoded_cache_do_not_disturb_each_other() -> None:
    model, ids = tiny("llama"), ids_of(4, 30)
    engine, _ = engine_of(model)
    text = ids[:1]
    _, cache = engine.prefill(text[:, :6])
    decoded(engine, text[:, 6:10], cache)
    fork, twins = engine.fork(cache, [0]), engine.fork(cache, [0, 0])
    # The cache itself writes first, into memory that its forks look at.
    same(decoded(engine, text[:, 10:14], cache), plainly(model, text[:, :14])[:, 10:])
    other = torch.cat([text[:, :10], ids[1:2, :4]], 1)
    same(decoded(engine, other[:, 10:], fork), plainly(model, other)[:, 10:])
    both = torch.cat([text[:, :10].expand(2, -1), ids[2:, :4]], 1)
    same(decoded(engine, both[:, 10:], twins), plainly(model, both)[:, 10:])
    nested = engine.fork(fork, [0])
    more = torch.cat([other, ids[3:, 10:14]], 1)
    same(decoded(engine, more[:, 14:], nested), plainly(model, more)[:, 14:])
    longer = torch.cat([other, ids[2:3, 20:24]], 1)
    same(decoded(engine, longer[:, 14:], fork), plainly(model, longer)[:, 14:])
    same(decoded(engine, text[:, 14:18], cache), plainly(model, text[:, :18])[:, 14:])


def test_caches_take_turns() -> None:
    model, ids = tiny("llama"), ids_of(3, 12)
    engine, recorder = engine_of(model)
    expected = plainly(model, ids)
    caches = [engine.prefill(ids[row : row + 1, :4])[1] for row in range(3)]
    for at in range(4, 12):
        for row, cache in enumerate(caches):
            found, _ = engine.decode(ids[row : row + 1, at : at + 1], cache)
            same(found, expected[row : row + 1, at : at + 1])
    assert recorder.count == 3


def test_a_graph_is_used_again_when_its_cache_is_gone() -> None:
    model, ids = tiny("llama"), ids_of(4, 24)
    engine, recorder = engine_of(model)
    expected = plainly(model, ids)
    for row in range(4):
        text = ids[row : row + 1]
        # Longer and shorter beginnings; the first cache leaves infinities behind.
        _, cache = engine.prefill(text[:, : 8 - row])
        same(decoded(engine, text[:, 8 - row :], cache), expected[row : row + 1, 8 - row :])
        for layer in cache.layers:
            layer.key_buffer.fill_(float("inf"))
            layer.value_buffer.fill_(float("nan"))
        del cache, layer
    assert recorder.count == 2


def test_few_idle_graphs_are_kept() -> None:
    model = tiny("llama")
    fast = GraphedDecode(model, Recorder())
    engine = TorchEngine(model, "cpu", [], fast=fast)
    for rows in (1, 2, 3, 4, 5):
        ids = ids_of(rows, 5)
        _, cache = engine.prefill(ids[:, :4])
        same(decoded(engine, ids[:, 4:], cache), plainly(model, ids)[:, 4:])
        del cache
    assert len(fast._graphs) == graphed.IDLE_GRAPHS


def test_other_caches_are_left_to_the_model() -> None:
    model, ids = tiny("llama"), ids_of(2, 6)
    fast = GraphedDecode(model, Recorder())
    assert fast.decode(ids[:, :1], BufferedCache(model.config)) is None
    cache = DynamicCache(config=model.config)
    TorchEngine(model, "cpu", []).prefill(ids, cache)
    assert fast.decode(ids[:, :1], cache) is None
    engine, recorder = engine_of(model)
    same(engine.decode(ids[:, :1], BufferedCache(model.config))[0], plainly(model, ids[:, :1]))
    assert recorder.count == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_agrees_is_taken(kind: str, dtype: torch.dtype) -> None:
    fast, name = checked(GraphedDecode(tiny(kind).to(dtype), Recorder()))
    assert isinstance(fast, GraphedDecode)
    assert name == fast.name == "one CUDA graph a token"


def test_experts_chosen_on_the_host_are_refused_before_recording() -> None:
    model, recorder = tiny("mixtral"), Recorder()
    model.config._experts_implementation = "eager"
    fast, reason = checked(GraphedDecode(model, recorder))
    assert fast is None
    assert reason.startswith("decoding cannot be recorded as a CUDA graph: aten.")
    assert reason.endswith(" waits for values that are on the device")
    assert recorder.count == 0


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.clone().index_put_((x > 0,), torch.ones(())),
        lambda x: x.nonzero(),
        lambda x: bool(x.any()),
        lambda x: x.to("meta"),
    ],
)
def test_what_the_host_has_to_wait_for_is_refused(wait: Any) -> None:
    x = torch.arange(4.0)
    with (
        pytest.raises(graphed.RefusedError, match="waits for values"),
        graphed._NothingWaits(),  # type: ignore[no-untyped-call]
    ):
        wait(x)


def test_what_stays_on_the_device_is_not_refused() -> None:
    x = torch.arange(4.0)
    with graphed._NothingWaits():  # type: ignore[no-untyped-call]
        y = x[torch.tensor([1])].to(torch.float16).masked_fill(x > 2, 7.0)
    assert y.tolist() == [1, 1, 1, 7]


def test_layers_that_forget_are_refused() -> None:
    config = {**CONFIGS["llama"], "model_type": "mistral", "sliding_window": 8}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mistral"].from_dict(config)).eval()
    fast, reason = checked(GraphedDecode(model, Recorder()))
    assert fast is None
    assert "DynamicSlidingWindowLayer" in reason


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_a_replay_that_disagrees_is_refused(error: float) -> None:
    model = tiny("llama")

    def recorder(step: Replay) -> Replay:
        return lambda: step() * torch.linspace(1 - error, 1 + error, VOCABULARY)

    fast, reason = checked(GraphedDecode(model, recorder))
    assert fast is None
    assert "differ from the model's by" in reason


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_position_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = graphed._Graph.run
    monkeypatch.setattr(graphed._Graph, "run", lambda self, token, at: run(self, token, at + 1))
    fast, reason = checked(GraphedDecode(tiny(kind), Recorder()))
    assert fast is None
    assert "differ from the model's by" in reason


def test_a_model_that_keeps_its_cache_elsewhere_is_refused() -> None:
    model = tiny("llama")
    forward = model.forward
    model.forward = lambda past_key_values=None, **rest: forward(**rest)
    fast, reason = checked(GraphedDecode(model, Recorder()))
    assert fast is None
    assert "does not keep its keys and values" in reason


def test_there_are_graphs_on_cards_only() -> None:
    model = tiny("llama")
    assert fast_decode(model, Machine()) == (None, "no CUDA graphs on cpu")
    fast, reason = fast_decode(model, Machine(device="cuda", offload="cpu"))
    assert fast is None
    assert "brought to the device" in reason


def test_keys_are_not_copied_for_every_query_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), ids_of(2, 12)
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    engine, _ = engine_of(model)
    expected = plainly(model, ids)
    _, cache = engine.prefill(ids[:, :6])
    copies: list[Tensor] = []
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda keys, _: copies.append(keys))
    same(decoded(engine, ids[:, 6:], cache), expected[:, 6:])
    assert copies == []
    assert model.config._attn_implementation == "sdpa"


def test_buffers_end_with_the_context() -> None:
    model, ids = tiny("gpt2"), ids_of(1, CONTEXT)
    engine, _ = engine_of(model)
    _, cache = engine.prefill(ids[:, : CONTEXT - 2])
    same(decoded(engine, ids[:, -2:], cache), plainly(model, ids)[:, -2:])
